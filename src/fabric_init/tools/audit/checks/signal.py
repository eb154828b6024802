"""Check the moments of the layers: values that vanish, explode or are not finite, and units that are always zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fabric_init.tools.audit.findings import Finding, Level
from fabric_init.tools.audit.measure.activations import ActivationMoments, Flow

_LARGEST = 1e4
_VANISHED = 1e-6
_DEAD = 0.9
_FIX_SCALE = "keep the variance from layer to layer: std = gain / sqrt(fan-in), or a normalization layer in between"
_FIX_FINITE = "check the inputs and weights of this layer: too large, a division by zero, a log of zero"


def flow_findings(flows: Sequence[Flow]) -> list[Finding]:
    """Return the findings about one pass; ``flows`` are in forward order.

    The thresholds are far outside of what sound models show: over 45 architectures as transformers builds them, with
    norms, layer scales of 1e-6 and gates that start closed, a trunk's activations stay within a factor of 1000.
    """
    broken = list(_not_finite(flows))
    if any(finding.level is Level.ERROR for finding in broken):
        return broken  # nothing after it can be measured
    return [*broken, *_exploding(flows), *_vanishing(flows), *_dead(flows), *_constant_outputs(flows)]


def _not_finite(flows: Sequence[Flow]) -> Iterator[Finding]:
    """Report an error if it spreads to the end; a mask may remove the NaN of a softmax over a hidden row."""
    back = [flow for flow in reversed(flows) if flow.gradient.known]
    for path, of, seen in (
        (flows, _activation, "NaN or infinity comes out of it, first of all layers"),
        (back, _gradient, "its gradient is the first on the way back with NaN or infinity"),
    ):
        first = next((flow for flow in path if of(flow).broken), None)
        if first is not None and of(path[-1]).broken:
            yield _finding(Level.ERROR, "not-finite", first, seen, _FIX_FINITE)
            return
        if first is not None:
            yield _finding(Level.NOTE, "not-finite", first, f"{seen}; it does not reach the end", _FIX_FINITE)


def _exploding(flows: Sequence[Flow]) -> Iterator[Finding]:
    first = next((flow for flow in flows if flow.activation.rms > _LARGEST), None)
    if first is not None:
        seen = f"the root mean square of its output is {first.activation.rms:.3g}; float16 ends at 65504"
        yield _finding(Level.WARNING, "exploding-activations", first, seen, _FIX_SCALE)
    early, late = _ends(flows, _gradient)
    if late is not None and early is not None and 0 < late.gradient.rms < _VANISHED * early.gradient.rms:
        seen = f"gradients grow from {late.gradient.rms:.3g} at {late.name} to {early.gradient.rms:.3g} here"
        yield _finding(Level.WARNING, "exploding-gradients", early, seen, _FIX_SCALE)


def _vanishing(flows: Sequence[Flow]) -> Iterator[Finding]:
    early, late = _ends(flows, _activation)
    if early is not None and late is not None and 0 < late.activation.rms < _VANISHED * early.activation.rms:
        seen = f"activations shrink from {early.activation.rms:.3g} at {early.name} to {late.activation.rms:.3g} here"
        yield _finding(Level.WARNING, "vanishing-activations", late, seen, _FIX_SCALE)
    early, late = _ends(flows, _gradient)
    if early is not None and late is not None and 0 < early.gradient.rms < _VANISHED * late.gradient.rms:
        seen = f"gradients shrink from {late.gradient.rms:.3g} at {late.name} to {early.gradient.rms:.3g} here"
        yield _finding(Level.WARNING, "vanishing-gradients", early, seen, _FIX_SCALE)


def _activation(flow: Flow) -> ActivationMoments:
    return flow.activation


def _gradient(flow: Flow) -> ActivationMoments:
    return flow.gradient


def _ends(flows: Sequence[Flow], of: Callable[[Flow], ActivationMoments]) -> tuple[Flow | None, Flow | None]:
    """Return the layers with the largest values in the first and in the last quarter.

    A branch may be small (a layer scale, the gradient of a key); the largest value is that of the trunk.
    """
    known = [flow for flow in flows if of(flow).known]
    quarter = -(-len(known) // 4)
    if len(known) < 2:
        return None, None
    return max(known[:quarter], key=lambda flow: of(flow).rms), max(known[-quarter:], key=lambda flow: of(flow).rms)


def _dead(flows: Sequence[Flow]) -> Iterator[Finding]:
    dead = [flow for flow in flows if flow.dead is not None and flow.dead > _DEAD]
    if dead:
        worst = max(flow.dead or 0.0 for flow in dead)
        names = tuple(flow.name for flow in dead)
        seen = f"up to {worst:.0%} of the units are zero for every sample of the batch"
        fix = "look at the biases and the mean of what goes in: a rectifier that never fires learns nothing"
        yield Finding(Level.WARNING, "dead-units", names, seen, fix)


def _constant_outputs(flows: Sequence[Flow]) -> Iterator[Finding]:
    names = tuple(flow.name for flow in flows if flow.leaf and flow.activation.count > 1 and flow.activation.var == 0)
    if names:
        fix = "nothing, where a branch is meant to start closed; else its weights, or what it is given, are constant"
        yield Finding(Level.NOTE, "constant-output", names, "every element of the output has the same value", fix)


def _finding(level: Level, check: str, flow: Flow, evidence: str, fix: str) -> Finding:
    return Finding(level, check, (flow.name,), f"{flow.module_class}: {evidence}", fix)
