"""What constructors do besides calling ``torch.nn.init``: each is built eagerly and recorded, compared bit for bit."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributions, nn
from torch.nn.utils import parametrizations, prune

from fabric_init import deferred_init
from fabric_init.api import materialize
from fabric_init.errors import CheckpointMismatchError, RecordingError
from tests.support.identity import compare

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

P = nn.Parameter
Constructor = Callable[[nn.Module], None]
CASES: dict[str, Constructor] = {}
OUTSIDE = torch.arange(9.0).reshape(3, 3)


def case(function: Constructor) -> Constructor:
    CASES[function.__name__.replace("_", " ")] = function
    return function


def model_of(constructor: Constructor) -> type[nn.Module]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            constructor(self)
            self.after = P(torch.randn(3))  # the random stream has to be in the right place afterwards

    return Model


# -- making tensors ----------------------------------------------------------------------------------------------------


@case
def torch_tensor_and_as_tensor(s):
    s.a = P(torch.tensor([1.0, 2.0, 3.0]))
    s.register_buffer("b", torch.tensor(3))
    s.register_buffer("c", torch.as_tensor([1, 2]))


@case
def tensors_of_tensors(s):
    s.a = P(torch.tensor([torch.tensor(1.0), torch.tensor(2.0)]))
    s.b = torch.as_tensor(torch.arange(3))
    s.c = torch.full((2,), torch.tensor(3.0))
    s.d = torch.linspace(torch.tensor(0.0), torch.tensor(1.0), 3)
    s.e = torch.arange(torch.tensor(3))
    s.f = torch.stack([torch.tensor(1.0), torch.tensor(2.0)])


@case
def a_list_of_recorded_scalars(s):
    s.a = P(torch.tensor([x * 2 for x in torch.arange(3.0)]))


@case
def lists_of_recorded_scalars_in_legacy_constructors(s):
    s.a = P(torch.Tensor([torch.ones(2).sum(), torch.rand(2).mean()]))
    s.b = P(torch.ones(2).new_tensor([torch.ones(2).sum(), torch.rand(2).mean()]))


@case
def functions_that_read_memory(s):
    s.register_buffer("sobol", torch.quasirandom.SobolEngine(4, scramble=True, seed=5).draw(4))
    s.a = P(torch.tensor_split(torch.rand(6), torch.arange(2, 5))[1])


@case
def sizes_and_values_of_a_forward_that_makes_views_in_place(s):
    window = torch.hann_window(16)
    s.a = P(torch.stft(torch.rand(2, 64), 16, window=window, return_complex=True).abs().mT.reshape(-1, 9))
    s.rnn = nn.GRU(8, 4, batch_first=True)
    with torch.no_grad():
        s.b = P(s.rnn(torch.rand(2, 5, 8))[0].flatten(1))


@case
def out_tensors_that_get_another_shape(s):
    s.a = P(torch.arange(5.0, out=torch.empty(0)))
    target = torch.empty(0)
    torch.linalg.svdvals(torch.rand(3, 4), out=target)
    s.b = P(target)


@case
def legacy_constructors(s):
    s.a = P(torch.Tensor(3, 4))
    s.a.data.fill_(2.0)
    s.b = P(torch.FloatTensor(5).uniform_())
    s.c = P(torch.Tensor([1, 2, 3]))
    s.d = P(torch.Tensor(3, 2))
    nn.init.normal_(s.d)


@case
def tensor_new(s):
    s.a = P(torch.ones(2).new(3, 4).zero_())
    s.b = P(torch.ones(2).new_ones(3))


@case
def tensor_new_with_values(s):
    s.c = P(torch.ones(2).new_tensor([1.0, 2.0]))
    s.d = P(torch.ones(2).new([1.0, 2.0]))


@case
def from_numpy(s):
    s.a = P(torch.from_numpy(np.random.RandomState(0).randn(3, 3)).float())
    s.register_buffer("b", torch.from_numpy(np.arange(3)))


@case
def numpy_that_changes_after_it_was_copied_in(s):
    array = np.ones(3, dtype=np.float32)
    s.a = P(torch.zeros(3))
    s.a.data.copy_(torch.from_numpy(array))
    array[:] = 7
    s.b = P(torch.tensor(array))


@case
def numpy_reads_a_tensor(s):
    t = torch.arange(6.0).reshape(2, 3)
    s.a = P(torch.tensor(t.numpy() * 2))
    s.b = P(torch.from_numpy(np.array(t.numpy())))
    s.values = [float(np.sum(t.numpy())), np.sqrt(t.numpy()).tolist(), np.stack([t.numpy(), t.numpy()]).tolist()]


@case
def dlpack(s):
    s.a = P(torch.from_dlpack(np.arange(3.0)))
    s.values = np.from_dlpack(torch.arange(3.0)).tolist()


@case
def out_arguments(s):
    made = torch.empty(3)
    torch.add(torch.ones(3), 1, out=made)
    s.a = P(made)
    torch.randn(3, out=made)
    s.b = torch.arange(3, out=torch.empty(3, dtype=torch.long))


@case
def set_and_resize(s):
    base = torch.arange(6.0)
    part = torch.empty(0)
    part.set_(base.untyped_storage(), 1, (2, 2), (2, 1))
    s.a = P(part)
    grown = torch.zeros(2)
    grown.resize_(4)
    grown.fill_(3.0)
    s.b = P(grown)


@case
def in_place_changes_of_geometry(s):
    t = torch.randn(1, 3)
    t.squeeze_(0)
    t.unsqueeze_(1)
    t.t_()
    s.a = P(t)
    u = torch.randn(2, 3)
    u.transpose_(0, 1)
    u.mul_(2)
    s.b = P(u)


@case
def complex_and_conjugate(s):
    s.a = P(torch.randn(3, dtype=torch.complex64))
    s.b = P(torch.complex(torch.randn(3), torch.randn(3)).conj())
    s.c = P(torch.polar(torch.ones(3), torch.arange(3.0)))
    s.register_buffer("d", torch.view_as_complex(torch.randn(3, 2)).imag)
    s.register_buffer("e", s.b.detach().conj().imag)


@case
def windows_and_fft(s):
    s.register_buffer("a", torch.fft.fft(torch.randn(8)))
    s.register_buffer("b", torch.hann_window(16))
    s.register_buffer("c", torch.hamming_window(16, periodic=False))


@case
def rotary_tables(s):
    inverse = 1.0 / (10000 ** (torch.arange(0, 8, 2, dtype=torch.int64).float() / 8))
    s.register_buffer("inverse", inverse, persistent=False)
    s.original = s.inverse
    angles = torch.outer(torch.arange(10).type_as(inverse), inverse)
    s.register_buffer("cos", torch.cat([angles, angles], -1).cos(), persistent=False)


def sparse_matrix() -> torch.Tensor:
    places, values = torch.tensor([[0, 1], [1, 2]]), torch.tensor([1.0, 2.0])
    return torch.sparse_coo_tensor(places, values, (3, 3), check_invariants=False)


@case
def sparse_buffers(s):
    s.register_buffer("a", torch.eye(3).to_sparse())
    s.register_buffer("b", sparse_matrix())


@case
def sparse_made_dense(s):
    s.register_buffer("a", sparse_matrix().to_dense())


@case
def default_dtype_changed_for_a_while(s):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        s.a = nn.Linear(2, 2)
        s.b = P(torch.rand(2))
    finally:
        torch.set_default_dtype(before)


@case
def dtype_changes(s):
    s.a = nn.Linear(3, 3).half()
    s.b = nn.Linear(3, 3, dtype=torch.bfloat16)
    s.c = nn.Linear(3, 3).double().float()
    s.d = nn.LSTM(2, 2).to(torch.bfloat16)
    s.e = P(torch.randn(3).to(torch.float8_e4m3fn), requires_grad=False)
    s.f = P(s.a.weight.data.type(torch.float64))
    s.g = P(torch.zeros(3).type("torch.HalfTensor"))
    s.kind = torch.zeros(3).type()


# -- writing -----------------------------------------------------------------------------------------------------------


@case
def a_number_set_into_a_slice(s):
    s.a = P(torch.zeros(4, 4))
    s.a.data[1] = 1
    s.a.data[0, 0] = 7.0
    s.a.data[:, 2] = torch.arange(4.0)


@case
def index_lists(s):
    t = torch.arange(6.0)
    s.a = P(t[[0, 1]])
    grid = torch.zeros(4, 4)
    grid[[0, 1], [2, 3]] = 5.0
    s.b = P(grid)


@case
def boolean_masks(s):
    t = torch.randn(10)
    s.a = P(t[t > 0])
    t[t < 0] = 0
    s.b = P(t)
    s.c = P(torch.masked_select(t, t > 0.5))
    s.d = torch.where(t > 0)[0]


@case
def init_of_slices(s):
    s.l = nn.Linear(3, 3)
    nn.init.normal_(s.l.weight.data[0:2], std=0.1)
    nn.init.constant_(s.l.weight[2], 1.0)
    nn.init.xavier_uniform_(s.l.weight.data.view(3, 3))
    nn.init.zeros_(s.l.bias[1:])
    nn.init.orthogonal_(s.l.weight.data[:2])


@case
def views_share_memory(s):
    base = torch.randn(4, 6)
    s.a, s.b, s.c = P(base[:2]), P(base[2:]), P(base.t())
    parts = base.split(2)
    parts[0].fill_(1.0)
    flat = base.reshape(-1)
    flat[-1:].zero_()


@case
def expanded_tensors(s):
    s.a = P(torch.randn(3, 1).expand(3, 4))
    s.register_buffer("b", torch.arange(5).expand((1, -1)))


@case
def data_set_to_recorded_tensors(s):
    s.a = nn.Linear(3, 3)
    s.a.weight.data = torch.randn(3, 3)
    s.a.bias.data = s.a.weight.data[0]
    s.b = nn.Linear(2, 2)
    s.b.weight.data = s.b.weight.data.clone().t()


@case
def data_set_to_a_real_tensor_that_changes_later(s):
    real = OUTSIDE.clone()
    s.a = P(torch.zeros(3, 3))
    s.a.data.copy_(real)
    real.fill_(100.0)
    s.b = P(real)


@case
def real_tensors_mixed_in(s):
    s.a = P(OUTSIDE)
    s.b = P(OUTSIDE @ torch.randn(3, 3))
    real = OUTSIDE.clone()
    real += torch.ones(3, 3)
    s.c = P(real)
    drawn = torch.from_numpy(np.zeros((3, 3), dtype=np.float32))
    nn.init.xavier_uniform_(drawn)
    s.d = P(drawn)


@case
def foreach_ops(s):
    s.a, s.b = P(torch.ones(3)), P(torch.ones(4))
    with torch.no_grad():
        torch._foreach_mul_([s.a, s.b], 0.5)
        torch._foreach_add_([s.a, s.b], [torch.ones(3), torch.ones(4)])
    s.held = list(torch._foreach_neg([s.a.detach(), s.b.detach()]))


# -- random numbers ----------------------------------------------------------------------------------------------------


@case
def every_in_place_draw(s):
    for name in ("uniform_", "normal_", "exponential_", "cauchy_", "log_normal_"):
        setattr(s, name, P(getattr(torch.empty(5), name)()))
    s.held = [
        torch.empty(5).geometric_(0.3),
        torch.empty(5).bernoulli_(torch.full((5,), 0.3)),
        torch.empty(5).random_(0, 10),
        F.dropout(torch.ones(5), 0.5),
        F.rrelu(torch.randn(5), training=True),
    ]


@case
def draws_without_a_meta_kernel(s):
    s.a = torch.poisson(torch.ones(3))
    s.b = torch.binomial(torch.full((3,), 10.0), torch.full((3,), 0.5))
    s.c = torch._sample_dirichlet(torch.ones(3))
    s.d = torch._standard_gamma(torch.ones(3))


@case
def sizes_at_which_normal_changes_its_algorithm(s):
    for size in (1, 3, 5, 15, 16, 17, 33):
        setattr(s, f"p{size}", P(torch.randn(size)))
    s.wide = P(torch.randn(17, dtype=torch.float64))


@case
def torch_distributions(s):
    s.a = P(distributions.Normal(0.0, 1.0).sample((3,)))
    s.b = P(distributions.Uniform(0.0, 1.0).sample((2,)))
    s.c = P(distributions.Categorical(torch.ones(3)).sample((4,)).float())
    s.d = P(distributions.Gamma(torch.ones(2), torch.ones(2)).sample())
    s.e = P(distributions.Laplace(0.0, 1.0).sample((3,)))
    s.f = P(distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)).sample())


@case
def generators_of_the_users_own(s):
    g = torch.Generator().manual_seed(3)
    s.a = P(torch.randn(3, generator=g))
    s.b = P(torch.empty(3).normal_(generator=g))
    s.c = torch.randperm(5, generator=g).tolist()
    s.d = P(nn.init.trunc_normal_(torch.empty(5), generator=g))
    s.e = P(nn.init.orthogonal_(torch.empty(3, 3), generator=g))
    s.f = P(nn.init.sparse_(torch.empty(4, 4), 0.5, generator=g))


# -- looking at values -------------------------------------------------------------------------------------------------


@case
def values_decide(s):
    s.values = [
        torch.equal(torch.arange(3), torch.arange(3)),
        bool((torch.randn(3) > 0).any()),
        torch.allclose(torch.ones(2), torch.ones(2)),
        len(torch.nonzero(torch.arange(4) % 2)),
        int(torch.arange(5).max()),
        3 in torch.arange(5),
        bool(torch.isfinite(torch.ones(3)).all()),
        list(range(torch.tensor(3))),
        [int(i) for i in torch.arange(4)],
        min(torch.randn(5)).item(),
        f"{torch.tensor(2.5):.2f}",
    ]


@case
def sizes_that_depend_on_values(s):
    s.a = torch.unique(torch.randint(0, 5, (10,)))
    s.b = torch.unique(torch.tensor([1, 1, 2]), return_counts=True)[1]
    s.c = torch.bincount(torch.tensor([1, 1, 2]))
    s.d = torch.repeat_interleave(torch.arange(2), torch.tensor([1, 2]))
    s.e = torch.isin(torch.arange(3), torch.tensor([1]))
    n = torch.tensor([2, 3])
    s.f = P(torch.zeros(n[0], int(n[1])))


@case
def printing(s):
    s.text = [repr(torch.randn(3)), f"{torch.tensor(3.0)}", str(nn.Linear(2, 2).weight)]


@case
def where_a_tensor_lives(s):
    t = torch.zeros(3)
    s.values = [
        str(t.device), t.is_meta, t.is_cpu, t.is_cuda, t.get_device(), t.to("cpu") is t, t.cpu() is t,
        t.to(torch.zeros(2)) is t, t.to(t.device, torch.float32) is t, t.to("cpu", copy=True) is t,
    ]  # fmt: skip
    s.a = torch.zeros(2, device=t.device)


@case
def addresses_tell_shared_memory(s):
    t = torch.zeros(4)
    s.values = [t.data_ptr() == t.view(2, 2).data_ptr(), t[1:].data_ptr() - t.data_ptr(), t.data_ptr() != 0]


# -- modules -----------------------------------------------------------------------------------------------------------


@case
def recurrent_layers_with_flat_weights(s):
    s.a = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    s.b = nn.GRU(3, 4)
    s.a.flatten_parameters()
    s.c = copy.deepcopy(s.a)


@case
def attention_and_friends(s):
    s.a = nn.MultiheadAttention(8, 2)
    s.b = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True)
    s.c = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    s.d = nn.Bilinear(2, 3, 4)
    s.e = nn.EmbeddingBag(5, 3)
    s.f = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    s.g = nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 10], div_value=2.0)


@case
def parameter_lists(s):
    s.a = nn.ParameterList([torch.randn(3), P(torch.zeros(2))])
    s.b = nn.ParameterDict({"x": torch.randn(2)})
    s.c = nn.ParameterList([P(torch.randn(2)) for _ in range(2)])
    s.c.append(s.c[0])


@case
def tied_weights(s):
    s.embedding, s.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    s.head.weight = s.embedding.weight
    s.held = [s.embedding.weight]


@case
def deep_copies(s):
    s.a = nn.Linear(3, 3)
    s.b = nn.ModuleList(copy.deepcopy(s.a) for _ in range(2))
    s.c = copy.deepcopy(s.b)
    s.d = copy.deepcopy(s.a.weight)
    s.e = copy.copy(s.a)


@case
def new_parametrizations(s):
    s.a = parametrizations.orthogonal(nn.Linear(4, 4))
    s.b = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    s.c = parametrizations.weight_norm(nn.Linear(3, 4))


@case
def old_weight_norm(s):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        s.a = nn.utils.weight_norm(nn.Linear(3, 3))


@case
def pruned(s):
    s.a, s.b = nn.Linear(4, 4), nn.Linear(4, 4)
    prune.l1_unstructured(s.a, "weight", amount=0.3)
    prune.random_unstructured(s.b, "weight", amount=0.5)


@case
def lazy_layers_that_saw_a_batch(s):
    s.a = nn.LazyLinear(3)
    s.a(torch.randn(2, 5))


@case
def skip_init_then_reset(s):
    s.a = nn.utils.skip_init(nn.Linear, 3, 3)
    s.a.reset_parameters()


@case
def a_meta_part_that_gets_memory(s):
    with torch.device("meta"):
        part = nn.Linear(3, 3)
    s.a = part.to_empty(device="cpu")
    s.a.reset_parameters()


@case
def none_and_empty(s):
    s.register_buffer("a", None)
    s.register_parameter("b", None)
    s.register_buffer("c", torch.tensor([], dtype=torch.long))
    s.d = P(torch.zeros(0, 3))


class Tagged(nn.Parameter):
    def __new__(cls, data, tag=1):
        made = torch.Tensor._make_subclass(cls, data, True)
        made.tag = tag
        return made


@case
def parameter_subclasses_and_attributes(s):
    s.a = Tagged(torch.randn(3), tag=5)
    s.b = P(torch.zeros(3))
    s.b.no_weight_decay = True


class Sub(torch.Tensor):
    pass


@case
def tensor_subclasses(s):
    s.a = torch.randn(3).as_subclass(Sub)


@case
def swapped_tensors(s):
    s.a, s.b = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.utils.swap_tensors(s.a.weight, s.b.weight)


@case
def state_dicts_loaded(s):
    source = nn.Linear(3, 3)
    s.a, s.b = nn.Linear(3, 3), nn.Linear(3, 3)
    s.a.load_state_dict(source.state_dict())
    s.b.load_state_dict(source.state_dict(), assign=True)


@case
def saved_and_loaded(s):
    source, buffer = nn.Linear(3, 3), io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    s.a = nn.Linear(3, 3)
    s.a.load_state_dict(torch.load(buffer))


CHECKPOINT = io.BytesIO()
torch.save(nn.Linear(3, 3).state_dict(), CHECKPOINT)


@case
def a_pretrained_part_loaded(s):
    CHECKPOINT.seek(0)
    s.a = nn.Linear(3, 3)
    s.a.load_state_dict(torch.load(CHECKPOINT))


@case
def pickled(s):
    s.a = pickle.loads(pickle.dumps(nn.Linear(3, 3)))


@case
def scripted(s):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)

        @torch.jit.script
        def twice(x: torch.Tensor) -> torch.Tensor:
            return x * 2 + 1

    s.a = P(twice(torch.ones(3)))


# -- autograd, forward passes, threads ---------------------------------------------------------------------------------


@case
def gradients(s):
    s.a = nn.Linear(3, 3)
    s.a(torch.ones(1, 3)).sum().backward()
    s.gradient = s.a.weight.grad.clone()
    s.a.weight.data -= 0.1 * s.a.weight.grad
    s.a.zero_grad()
    x = torch.ones(3, requires_grad=True)
    s.register_buffer("b", torch.autograd.grad((x**2).sum(), x)[0])


@case
def an_optimizer_step(s):
    s.a = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(s.a.parameters())
    s.a(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@case
def vmap_and_func(s):
    s.a = P(torch.vmap(lambda x: x * 2 + 1)(torch.arange(6.0).reshape(2, 3)))
    s.b = P(torch.vmap(lambda x: x + torch.randn(3), randomness="different")(torch.zeros(2, 3)))
    s.c = P(torch.func.grad(lambda x: (x**3).sum())(torch.arange(3.0)))


@case
def a_dummy_forward_through_batch_norm(s):
    s.a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    s.b = nn.Linear(s.a(torch.zeros(1, 3, 8, 8)).shape[1], 2)
    s.c = nn.InstanceNorm1d(3, track_running_stats=True)
    s.c(torch.randn(4, 3, 5))


@case
def dropout_of_everything_and_of_nothing(s):
    s.a = F.dropout(torch.ones(3), 1.0)
    s.b = F.dropout(torch.ones(3), 0.0)


@case
def a_thread_of_the_constructors_own(s):
    made = []
    thread = threading.Thread(target=lambda: made.append(torch.ones(3)))
    thread.start()
    thread.join()
    s.a = P(made[0])


@case
def an_attribute_with_a_graph(s):
    s.a = P(torch.ones(3))
    s.b = s.a * 2


@case
def linear_algebra(s):
    q, _ = torch.linalg.qr(torch.randn(4, 4))
    s.a = P(q)
    s.b = torch.linalg.det(q).item()
    s.c = P(torch.linalg.inv(torch.eye(3) * 2))
    s.d = torch.linalg.eigh(torch.eye(3))[0]
    s.e = P(torch.linalg.svd(torch.randn(2, 5, 3), full_matrices=False)[2])
    s.f = torch.linalg.eig(torch.randn(3, 3)).eigenvectors


@case
def sorting_and_counting(s):
    values, order = torch.sort(torch.randn(5))
    s.held = [
        values, order, torch.topk(values, 2).values, values.max(0).indices, torch.histc(torch.arange(5.0), 3),
        torch.bucketize(torch.tensor([2.5]), torch.arange(5.0)), torch.quantile(torch.arange(4.0), 0.5),
        torch.cartesian_prod(torch.arange(2), torch.arange(2)), *torch.meshgrid(torch.arange(3), indexing="ij"),
    ]  # fmt: skip


@case
def deep_copies_of_constants(s):
    s.a = nn.BatchNorm1d(3)
    s.register_buffer("b", torch.tensor([1.0, 2.0]))
    s.c = torch.tensor(7)
    s.held = [copy.deepcopy(s.a), copy.deepcopy([s.b, s.c, s.b]), copy.deepcopy(s.c).add_(1)]


@case
def storages_that_copy_their_bytes(s):
    s.a = torch.tensor([1.0, 2.0, 3.0])
    s.b = torch.frombuffer(bytearray(12), dtype=torch.float32)
    s.b.untyped_storage().copy_(s.a.untyped_storage())
    s.c = torch.empty(0).set_(s.a.untyped_storage().clone(), 1, (2,))
    s.held = [s.b + 1, s.c * 2]
    s.c.mul_(3)


@case
def set_to_other_memory(s):
    real = OUTSIDE.clone()
    x, y, z, none = torch.randn(1, 3), torch.zeros(3), torch.randn(3), torch.ones(2)
    x.set_(real)
    x.mul_(2)
    z.set_(y, 1, (2,), (1,))
    z.fill_(3.0)
    none.set_()
    s.a, s.b = P(x), P(torch.randn(2, 2).set_(OUTSIDE, 1, (2,), (1,)).abs())
    s.held = [real.clone(), y, z, none.abs(), torch.empty(0).set_(y.untyped_storage()) + 1]
    s.values = [y.is_set_to(y.view(3)), y.is_set_to(z), z.set_(y).is_set_to(y)]


@case
def storages_by_element(s):
    a, b, c = torch.zeros(3), torch.ones(3), torch.arange(3.0)
    typed = a.storage()
    typed.fill_(3)
    typed[0] = 5
    b.untyped_storage()[3] = 64
    c.storage().copy_(b.storage())
    c.add_(1)
    s.held = [a, b, c, torch.Tensor(c.storage()), torch.FloatTensor(typed.clone()), copy.deepcopy(typed).tolist()]
    s.values = [typed.tolist(), typed[1], list(b.untyped_storage()), c.storage().double().tolist()]


@case
def functions_of_python_on_each_element(s):
    a, b, real = torch.rand(2, 2), torch.ones(2, 2), OUTSIDE[:2, :2].clone()
    a.apply_(lambda v: v * 2 + 1)
    b.t().map_(a, lambda one, other: one - other)
    b[0].map2_(a[0], torch.ones(2), lambda *values: sum(values))
    s.a = P(a)
    s.held = [b, real.map_(a, lambda one, other: one + other), a.mul_(2)]
    with pytest.raises(RuntimeError, match="requires grad"):
        s.a.apply_(abs)


@case
def writes_to_real_memory_through_another_tensor(s):
    real = torch.tensor([1.0, 2.0, 3.0])
    alias = torch.empty(0).set_(real.untyped_storage(), 1, (2,))
    s.a = P(alias * 2)  # of the values from before
    alias.mul_(10)
    alias[0] += 1
    nn.init.uniform_(alias[1:])
    s.b = real.clone()
    s.c = P(alias.clone())


@pytest.mark.parametrize("name", CASES)
def test_recorded_and_filled_like_eager(name: str) -> None:
    verdict = compare(model_of(CASES[name]))
    assert verdict.tensors > 0
    assert verdict.differences == []
    assert verdict.never_written == []


# -- garbage -----------------------------------------------------------------------------------------------------------

GARBAGE: dict[str, tuple[Constructor, set[str]]] = {
    "torch.empty and nothing else": (lambda s: setattr(s, "a", P(torch.empty(3))), {"a"}),
    "an element left out": (lambda s: (setattr(s, "a", P(torch.empty(3))), s.a.data[:2].fill_(1)), {"a"}),
    "cast to another dtype": (lambda s: (setattr(s, "a", P(torch.empty(3))), s.half()), {"a"}),
    "cloned": (lambda s: setattr(s, "a", P(torch.empty(3).clone())), {"a"}),
    "part of a cat": (lambda s: setattr(s, "a", P(torch.cat([torch.empty(2), torch.ones(2)]))), {"a"}),
    "scaled in place": (lambda s: (setattr(s, "a", P(torch.empty(3))), s.a.data.mul_(2)), {"a"}),
    "skip_init": (lambda s: setattr(s, "a", nn.utils.skip_init(nn.Linear, 3, 3)), {"a.weight", "a.bias"}),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_memory_that_nothing_was_written_to_is_refused_by_name_however_it_was_passed_on(name: str) -> None:
    constructor, expected = GARBAGE[name]
    verdict = compare(model_of(constructor))
    assert verdict.differences == []
    assert set(verdict.never_written) == expected


def test_shapes_of_empty_tensors_may_be_used() -> None:
    def constructor(s: nn.Module) -> None:
        e = torch.empty(3)
        s.a, s.b, s.c = P(torch.zeros_like(e)), P(torch.randn_like(e)), P(e.new_ones(2))
        s.d = P(torch.full_like(e, 2.0))
        table = torch.empty(4, 2)
        table[:, 0::2] = torch.arange(4.0)[:, None]
        table[:, 1::2] = 1.0
        s.register_buffer("e", table.clone())

    verdict = compare(model_of(constructor))
    assert verdict.differences == []
    assert verdict.never_written == []


# -- what cannot be recorded -------------------------------------------------------------------------------------------


def test_share_memory_in_a_constructor_is_refused_with_the_reason() -> None:
    with pytest.raises(RecordingError, match=r"share_memory_.*shape \(3, 3\) has no memory"), deferred_init():
        nn.Linear(3, 3).share_memory()


def test_writing_through_a_numpy_array_is_refused_by_numpy() -> None:
    with deferred_init(), pytest.raises(ValueError, match="read-only"):
        torch.zeros(3).numpy()[0] = 5


def test_dlpack_in_a_block_gives_values_that_nobody_can_write_to() -> None:
    with deferred_init():
        table = torch.arange(3.0)
        with pytest.raises(ValueError, match="read-only"):
            np.from_dlpack(table)[0] = 5
        for use in (torch.from_dlpack, torch.Tensor.__dlpack__):
            with pytest.raises(RecordingError, match="what is written there would be lost"):
                use(table)
        assert torch.from_dlpack(table, copy=True).tolist() == [0, 1, 2]
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):  # torch's own: nobody hears of this call
            torch.utils.dlpack.to_dlpack(table)


def test_setting_a_real_tensor_on_recorded_memory_is_refused() -> None:
    real = torch.ones(3)
    with deferred_init():
        table = torch.zeros(3)
        for source in (table, table.untyped_storage()):
            with pytest.raises(RecordingError, match="a real tensor is set on the memory of a recorded one"):
                real.set_(source)
    assert real.tolist() == [1, 1, 1]


def test_a_storage_in_a_block_is_not_saved_without_its_bytes() -> None:
    with deferred_init(), pytest.raises(RecordingError, match="storage has no bytes yet"):
        torch.save(torch.ones(3).storage(), io.BytesIO())


def test_a_meta_tensor_from_outside_is_refused_with_the_reason() -> None:
    outside = torch.empty(3, device="meta")
    with deferred_init(), pytest.raises(RecordingError, match="outside this block"):
        torch.ones(3) + outside


def test_a_tensor_kept_in_a_cache_across_blocks_has_one_value() -> None:
    @functools.lru_cache
    def table() -> torch.Tensor:
        return torch.randn(4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = P(table().clone())

    torch.manual_seed(0)
    expected = torch.randn(4)
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        first = Model()
    with deferred_init(rng="eager"):
        second = Model()
    materialize(first)
    materialize(second)
    assert torch.equal(first.a, expected)
    assert torch.equal(second.a, expected)


def test_autocast_in_a_constructor_is_refused_with_the_reason() -> None:
    with deferred_init():
        layer = nn.Linear(3, 3)
        with pytest.raises(RecordingError, match="autocast"), torch.autocast("cpu", dtype=torch.bfloat16):
            layer(torch.ones(1, 3))


def test_a_tensor_given_to_an_init_function_counts_with_its_value_at_that_moment() -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.a, model.b = nn.Parameter(torch.empty(50)), nn.Parameter(torch.empty(50))
        std = torch.tensor(1.0)
        nn.init.normal_(model.a, 0.0, std)
        std.mul_(0.01)
        nn.init.normal_(model.b, 0.0, std)
        bound = torch.ones(1).sum() * 0.5
        model.c = nn.Parameter(torch.empty(50))
        nn.init.uniform_(model.c, -bound, bound)
        return model

    verdict = compare(build)
    assert verdict.differences == []


# -- classes and attributes of tensors ---------------------------------------------------------------------------------


class Labelled(torch.Tensor):
    label: str

    @staticmethod
    def __new__(cls, data: torch.Tensor, label: str) -> Labelled:
        made = torch.Tensor._make_subclass(cls, data)
        made.label = label
        return made


class Other(torch.Tensor):
    pass


class OfOwnClasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parameter = P(Labelled(torch.rand(4), "a"))
        self.other = P(torch.rand(2).as_subclass(Other))
        self.kept = [
            Labelled(torch.rand(2), "b"),
            torch.rand(3).as_subclass(Other),
            self.other.detach().as_subclass(Labelled),
        ]
        self.register_buffer("detached", self.kept[0].detach())

    def tensors(self) -> list[torch.Tensor]:
        return [*self.parameters(), *self.buffers(), *self.kept]


def test_tensors_of_own_classes_whose_constructors_take_arguments_have_their_classes_and_values() -> None:
    torch.manual_seed(0)
    plain = OfOwnClasses().tensors()
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        model = OfOwnClasses()
    materialize(model)
    found = model.tensors()
    for one, other in zip(plain, found, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other)
        assert vars(one) == vars(other)
        assert isinstance(one, P) is isinstance(other, P)
        assert one.requires_grad is other.requires_grad


def test_a_gradient_that_a_constructor_sets_is_a_plain_tensor_once_the_model_is_filled() -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
        model.weight.grad = torch.arange(4.0).view(2, 2)
    materialize(model)
    assert type(model.weight.grad) is torch.Tensor
    assert model.weight.grad.tolist() == [[0, 1], [2, 3]]


# -- what a tape cannot describe ---------------------------------------------------------------------------------------

NOT_STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda w: w.to_sparse(),
    "sparse of values": lambda w: torch.sparse_coo_tensor(
        torch.tensor([[0, 1], [1, 2]]), w[0, :2], (3, 3), check_invariants=False
    ),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "nested": lambda w: torch.nested.nested_tensor([w[0], w[1, :2]]),
}


class KeepsNotStrided(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = P(torch.rand(3, 3))
        self.kept = NOT_STRIDED[kind](self.weight.detach())

    def values(self) -> torch.Tensor:
        if self.kept.is_nested:
            return torch.cat([part.flatten() for part in self.kept.unbind()])
        return self.kept.dequantize() if self.kept.is_quantized else self.kept.to_dense()


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("kind", NOT_STRIDED)
def test_sparse_quantized_and_nested_tensors_have_their_values_and_no_load_leaves_them_behind(
    kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = KeepsNotStrided(kind)
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        model = KeepsNotStrided(kind)
    materialize(model)
    assert torch.equal(model.values(), plain.values())

    torch.save(KeepsNotStrided(kind).state_dict(), tmp_path / "other.pt")
    with deferred_init():
        model = KeepsNotStrided(kind)
    with pytest.raises(CheckpointMismatchError, match="has looked at values that were computed from weight"):
        materialize(model, checkpoint=tmp_path / "other.pt")
