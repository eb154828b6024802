"""An audit such as a bad T5 would get, written by hand."""

from __future__ import annotations

import math

from fabric_init.reports.provenance import Write
from fabric_init.tools.audit.findings import AuditRow, Finding, Layer, Level
from fabric_init.tools.audit.report import AuditReport

MODEL = "models/t5.py"


def write(rule: str, line: int, elements: int, wasted: bool = False) -> Write:
    return Write(rule, MODEL, line, True, elements, wasted)


def weight(name: str, shape: tuple[int, int], std: float, *, ties: tuple[str, ...] = ()) -> AuditRow:
    elements = math.prod(shape)
    writes = (
        write("kaiming_uniform_(a=2.23607)", 12, elements, wasted=True),
        write(f"normal_(std={std:g})", 40, elements),
    )
    rule = writes[-1].rule
    return AuditRow(
        name=name,
        shape=shape,
        dtype="float32",
        module_class="Linear",
        rule=rule,
        file=MODEL,
        line=40,
        mean=0.0,
        std=std,
        writes=writes,
        full_writes=2,
        wasted_elements=elements,
        wasted_seconds=1e-9 * elements,
        ties=ties,
    )


def scale(name: str) -> AuditRow:
    writes = (write("ones_()", 15, 512),)
    return AuditRow(
        name=name,
        shape=(512,),
        dtype="float32",
        module_class="T5LayerNorm",
        rule="ones_()",
        file=MODEL,
        line=15,
        mean=1.0,
        std=0.0,
        writes=writes,
        full_writes=1,
        wasted_elements=0,
    )


def bad_audit() -> AuditReport:
    blocks = [f"encoder.block.{i}.layer.{j}" for i in range(8) for j in range(2)]
    rows = [weight("shared.weight", (32128, 512), 1.0, ties=("encoder.embed_tokens.weight",))]
    for block in blocks:
        rows += [weight(f"{block}.q.weight", (384, 512), 0.0055), weight(f"{block}.o.weight", (512, 384), 0.051)]
        rows.append(scale(f"{block}.layer_norm.weight"))
    rows.append(weight("lm_head.weight", (32128, 512), 1.0))
    rows.append(
        AuditRow(name="bias", shape=(512,), dtype="float32", module_class="Head", full_writes=0, wasted_elements=0)
    )
    findings = (
        Finding(
            Level.ERROR,
            "first-loss",
            ("lm_head.weight",),
            "The logits vary by 512, so the first loss is far from ln(32128) = 10.38.",
            "nn.init.normal_(model.lm_head.weight, std=0.0442)",
            std=0.0442,
            loss_before=179.3,
            loss_after=10.6,
        ),
        Finding(Level.ERROR, "never-written", ("bias",), "torch.empty, and no rule wrote it.", "nn.init.zeros_(bias)"),
        Finding(
            Level.WARNING,
            "written-again",
            tuple(row.name for row in rows if (row.full_writes or 0) > 1),
            f"2 full writes each: kaiming_uniform_ at {MODEL}:12, then normal_ at {MODEL}:40.",
            "Build the layers under torch.nn.utils.skip_init.",
        ),
        Finding(Level.NOTE, "by-the-way", (), "Nothing to worry about.", ""),
    )
    layers = [
        Layer(block, "T5Block", 0.0, 1.6**i, 0.0, 1e-4 * 0.7**i if i != 5 else 0.0) for i, block in enumerate(blocks)
    ]
    return AuditReport("T5ForConditionalGeneration", tuple(rows), findings, tuple(layers), 179.3, 10.38)


def clean_audit() -> AuditReport:
    return AuditReport("Linear", (scale("norm.weight"),))
