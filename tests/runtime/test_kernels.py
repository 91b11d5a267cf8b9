"""Each swap of kernels.py against the plain module: the same values, the same gradients, the same parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lean import LeanResBlock, norm_silu
from src.model import Attention, ResBlock, Upsample
from src.runtime.kernels import FormulaAttention, FourProductUpsample, LowPrecisionNorm, QuickNorm, speed_up, swaps
from tests.test_model import batch, gradients, tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def swapped(module: nn.Module, quick: type) -> nn.Module:
    other = copy.deepcopy(module)
    other.__class__ = quick
    return other


def values_and_gradients(module, *inputs):
    """The output, and the gradients of all inputs and parameters for one fixed gradient of the output."""
    out = module(*inputs)
    dy = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, [*(x for x in inputs if x.requires_grad), *module.parameters()], dy)]


def relative_errors(some, exact) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(some, exact)]


def random(*shape, dtype=torch.float64, layout=torch.contiguous_format):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).contiguous(memory_format=layout).requires_grad_()


# --- which swaps there are --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_names_shapes_and_values_of_parameters_stay(device, dtype):
    model = tiny(num_classes=4)
    before = copy.deepcopy(model.state_dict())
    speed_up(model, device, dtype)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = {type(module) for module in model.modules()}
    assert all(quick in found and plain not in found for plain, quick in swaps(device, dtype).items())


def test_a_copy_has_weights_of_its_own():
    """As the running average is: a copy of a network that was sped up."""
    model, (x, t, y) = tiny(num_classes=4), batch()
    speed_up(model, CPU, torch.bfloat16)
    other = copy.deepcopy(model)
    before = other(x, t, y)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(other(x, t, y), before) and before.abs().max() > 0


def test_in_float32_the_network_computes_the_same():
    plain, (x, t, y) = tiny(num_classes=4), batch()
    quick = copy.deepcopy(plain)
    speed_up(quick, CPU, torch.float32)
    torch.testing.assert_close(quick(x, t, y), plain(x, t, y), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients(quick, x, t, y), gradients(plain, x, t, y), atol=1e-5, rtol=1e-3)


def errors_in_bf16(network, model, exact, wanted) -> tuple[float, float]:
    """How far the output and the gradients are from those of float32, relative."""
    x, t, y = batch()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, t, y)
    out.square().mean().backward()
    apart = sum((parameter.grad - wanted[name]).square().sum() for name, parameter in model.named_parameters())
    size = sum(gradient.square().sum() for gradient in wanted.values())
    return ((out - exact).norm() / exact.norm()).item(), (apart / size).sqrt().item()


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_in_bf16_the_network_is_as_near_to_float32_as_the_plain_one_compiled_or_not(backend):
    plain = tiny(16, dim=16, num_classes=4).to(memory_format=torch.channels_last)
    exact, wanted = plain(*batch()).detach(), gradients(plain, *batch())
    quick = copy.deepcopy(plain)
    speed_up(quick, CPU, torch.bfloat16)
    network = torch.compile(quick, fullgraph=True, backend=backend) if backend else quick
    ours, theirs = (errors_in_bf16(f, f_model, exact, wanted) for f, f_model in ((network, quick), (plain, plain)))
    assert max(theirs) < 0.02
    assert all(a < 1.5 * b for a, b in zip(ours, theirs)), (ours, theirs)


def test_in_bf16_nothing_large_is_kept_in_float32_but_what_the_last_convolution_reads():
    model, (x, t, _) = tiny(dim=32), batch(8)
    speed_up(model, CPU, torch.bfloat16)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(x, t)
    large = [(dtype, shape) for dtype, shape in kept if torch.Size(shape).numel() >= 8 * 32 * 8 * 8]
    assert [entry for entry in large if entry[0] == torch.float32] == [(torch.float32, (8, 32, 16, 16))]
    assert len(large) > 20


# --- GroupNorm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [LowPrecisionNorm, QuickNorm])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
def test_a_norm_is_as_near_to_float64_as_the_plain_one_and_stays_in_its_precision(quick, layout, offset):
    norm = nn.GroupNorm(4, 16)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = (random(3, 16, 6, 6) + offset).detach().bfloat16().contiguous(memory_format=layout).requires_grad_()
    exact = values_and_gradients(copy.deepcopy(norm).double(), x.detach().double().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        ours = values_and_gradients(swapped(norm, quick), x)
    half = values_and_gradients(copy.deepcopy(norm).bfloat16(), x)
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16 and ours[0].is_contiguous(memory_format=layout)
    errors, errors_of_half = relative_errors(ours, exact), relative_errors(half, exact)
    assert all(a < 1.1 * b + 1e-4 for a, b in zip(errors[:2], errors_of_half)), "the output and the gradient of x"
    assert all(a < 2 * b + 1e-3 for a, b in zip(errors[2:], errors_of_half[2:])), "the gradients of weight and bias"


def test_the_derivative_written_out_is_that_of_the_norm():
    """In float64, where nothing rounds."""
    x, weight, bias = random(2, 12, 3, 3, layout=torch.channels_last), random(12), random(12)
    from src.runtime.kernels import _QuickNorm

    assert torch.autograd.gradcheck(lambda *args: _QuickNorm.apply(*args, 3, 1e-5), (x, weight, bias))


@pytest.mark.parametrize("function", [lambda norm, x: swapped(norm, QuickNorm)(x), norm_silu])
def test_a_second_derivative_is_refused_and_not_wrong(function):
    x = random(2, 16, 4, 4, dtype=torch.bfloat16, layout=torch.channels_last)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(function(nn.GroupNorm(4, 16), x).sum(), x, create_graph=True)


# --- norm and SiLU in one, for CUDA -----------------------------------------------------------------------


def norm_and_inputs(with_scale, dtype=torch.float64, layout=torch.channels_last, batch=2, channels=12, size=3):
    """A norm of 3 groups, and x, scale and shift that need gradients."""
    norm = nn.GroupNorm(3, channels).to(torch.promote_types(dtype, torch.float32))
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = random(batch, channels, size, size, dtype=dtype, layout=layout)
    return norm, [x, *([random(batch, channels, dtype=dtype), random(batch, channels, dtype=dtype)] if with_scale else [])]


def plain_norm_silu(norm, x, scale=None, shift=None):
    h = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return F.silu(h if scale is None else h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


class NormSiLU(nn.Module):
    def __init__(self, norm, function):
        super().__init__()
        self.norm, self.function = norm, function

    def forward(self, *inputs):
        return self.function(self.norm, *inputs)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_and_silu_in_one_are_the_norm_and_silu(with_scale, layout):
    norm, inputs = norm_and_inputs(with_scale, layout=layout)
    ours, theirs = (values_and_gradients(NormSiLU(norm, f), *inputs) for f in (norm_silu, plain_norm_silu))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert ours[0].is_contiguous(memory_format=layout)
    weights = (norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_())

    def function(weight, bias, *inputs):
        return torch.func.functional_call(NormSiLU(norm, norm_silu), {"norm.weight": weight, "norm.bias": bias}, inputs)

    assert torch.autograd.gradcheck(function, (*weights, *inputs))


@pytest.mark.parametrize("with_scale", [False, True])
def test_in_bf16_it_is_as_near_to_float64_as_the_plain_one(with_scale):
    norm, inputs = norm_and_inputs(with_scale, torch.bfloat16, channels=48, size=8)
    exact_inputs = [a.detach().double().requires_grad_() for a in inputs]
    exact = values_and_gradients(NormSiLU(copy.deepcopy(norm).double(), plain_norm_silu), *exact_inputs)
    found = (values_and_gradients(NormSiLU(norm, f), *inputs) for f in (norm_silu, plain_norm_silu))
    errors = [relative_errors(some, exact) for some in found]
    assert all(ours < 1.2 * theirs + 1e-3 for ours, theirs in zip(*errors)), errors


def bytes_kept(function, *inputs) -> int:
    """For the backward pass: each storage once, and those of parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*inputs)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("with_scale", "theirs"), [(False, 2), (True, 3)])
def test_norm_and_silu_in_one_keep_their_input_alone(with_scale, theirs):
    norm, (x, *rest) = norm_and_inputs(with_scale, torch.bfloat16, batch=4, channels=96, size=32)
    assert bytes_kept(NormSiLU(norm, norm_silu), x, *rest) == pytest.approx(x.nbytes, rel=0.02)
    assert bytes_kept(NormSiLU(norm, plain_norm_silu), x, *rest) == pytest.approx(theirs * x.nbytes, rel=0.02)


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_lean_block_is_a_residual_block_compiled_or_not(backend):
    block = ResBlock(16, 32, 24, 8, dropout=0.0)
    nn.init.normal_(block.conv_2.weight, std=0.1), nn.init.normal_(block.norm_2.bias)
    x, emb = random(2, 16, 8, 8, dtype=torch.float32, layout=torch.channels_last), random(2, 24, dtype=torch.float32)
    lean = swapped(block, LeanResBlock)
    call = torch.compile(lean, fullgraph=True, backend=backend) if backend else lean
    ours = call(x, emb), *torch.autograd.grad(call(x, emb).square().sum(), [x, emb, *lean.parameters()])
    theirs = block(x, emb), *torch.autograd.grad(block(x, emb).square().sum(), [x, emb, *block.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# --- attention and up-sampling ----------------------------------------------------------------------------


def test_attention_by_its_formula_is_attention():
    layer = Attention(128, 8).double()
    nn.init.normal_(layer.out.weight)
    x = random(2, 128, 4, 4)
    torch.testing.assert_close(values_and_gradients(swapped(layer, FormulaAttention), x), values_and_gradients(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_channels_last_copies_nothing_large_forward(dtype):
    """So the fused kernel gets q, k and v as views of one product, and its result is read as it lies."""
    layer = Attention(128, 8)
    layer.norm.__class__ = LowPrecisionNorm
    x, moved = random(2, 128, 8, 8, dtype=dtype, layout=torch.channels_last), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("clone", "copy_", "contiguous", "cat", "_to_copy"):
                moved.extend(a for a in args if isinstance(a, torch.Tensor) and a.shape[0] == 2)
            return func(*args, **(kwargs or {}))

    with Copies(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        y = layer(x)
    assert not moved and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_up_sampling_with_four_products_is_up_sampling(layout):
    layer = Upsample(6).double()
    x = random(2, 6, 5, 5, layout=layout)
    ours, plain = values_and_gradients(swapped(layer, FourProductUpsample), x), values_and_gradients(layer, x)
    torch.testing.assert_close(ours, plain)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_up_sampling_with_four_products_rounds_no_more_and_saves_5_of_9():
    layer, x = Upsample(32), random(2, 32, 8, 8, dtype=torch.float32)
    exact, errors, flops = layer(x), [], []
    for module in (swapped(layer, FourProductUpsample), layer):
        with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
            errors.append((module(x) - exact).norm())
        flops.append(counter.get_flop_counts()["Global"][torch.ops.aten.convolution])
    assert flops[0] * 9 == flops[1] * 4
    assert errors[0] < 1.1 * errors[1]
