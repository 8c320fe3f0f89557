"""One recurrent mixer alone: built in float64, compared with a reference of its formula, cut, padded and packed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.modeling.packing import Rows

TIME = 9
PLAIN = Rows()


def build(
    spec: dict[str, Any], layer_idx: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any
) -> torch.nn.Module:
    """The mixer of one layer of a tiny model, with weights large enough to matter."""
    sizes = {
        "vocab_size": 5,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.4,
        **sizes,
    }
    torch.manual_seed(0)
    feed_forward = {"type": "mlp", "intermediate_size": 4}
    config = HfMoeConfig(blocks={"b": {"mixer": spec, "feed_forward": feed_forward}}, **sizes)
    mixer = HfMoeForCausalLM(config).model.layers[layer_idx].self_attn
    for parameter in mixer.parameters():  # biases too
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return mixer.to(dtype)


def hidden(mixer: torch.nn.Module, time: int = TIME, rows: int = 1, size: int = 16) -> Tensor:
    """(rows, time, size) inputs in the mixer's dtype."""
    generator = torch.Generator().manual_seed(time)
    return torch.randn(rows, time, size, generator=generator, dtype=next(mixer.parameters()).dtype)


def rotation(time: int, width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, time, width) of rotary positions in float64."""
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(time, dtype=torch.float64), frequencies).repeat(1, 2)[None]
    return angles.cos(), angles.sin()


def compare(mixer: torch.nn.Module, reference: Callable, tolerance: float = 1e-9, rows: Rows = PLAIN) -> None:
    """`reference(weights, vectors) -> vectors`: outputs, and the gradients of inputs and weights."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    ours = hidden(mixer).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    output, _ = mixer.scan(ours, mixer.initial_states(ours), rows)
    expected = torch.stack(reference(weights, list(theirs[0])))
    torch.testing.assert_close(output[0], expected, atol=tolerance, rtol=tolerance)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    (output[0] * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=tolerance, rtol=tolerance)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def run(mixer: torch.nn.Module, inputs: Tensor, rows: Rows = PLAIN, states: Any = None) -> tuple[Tensor, list]:
    output, states = mixer.scan(inputs, states or mixer.initial_states(inputs), rows)
    return output, list(states)


@torch.no_grad()
def check_rows(mixer: torch.nn.Module, tolerance: float = 1e-9, table: tuple | None = None) -> None:
    """Pieces, padding anywhere and packed sequences give what the plain sequences give, states included.

    Args:
        table: cosines and sines (1, TIME, width) if the mixer reads positions.
    """

    def close(actual: Any, expected: Any) -> None:
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)

    def rows(mask: Tensor | None = None, segments: Tensor | None = None, index: Any = slice(None)) -> Rows:
        return Rows(mask, segments, table and tuple(x[:, index] for x in table))

    x = hidden(mixer)
    whole, states = run(mixer, x, rows())
    outputs, carried, start = [], None, 0
    for size in (1, 4, 1, 3):
        part = slice(start, start + size)
        output, carried = run(mixer, x[:, part], rows(index=part), carried)
        outputs.append(output)
        start += size
    close(torch.cat(outputs, 1), whole)
    close(carried, states)

    # two rows of one call: padded on the left and in the middle; on the right
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    batch = hidden(mixer, rows=2)
    padded, after = run(mixer, batch, rows(mask))
    for row in range(2):
        real = mask[row]
        alone, alone_after = run(mixer, batch[row : row + 1, real], rows(index=real))
        close(padded[row, real], alone[0])
        close([state[row : row + 1] for state in after], alone_after)

    segments = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2]])
    packed, after = run(mixer, x, rows(segments=segments))
    for number in range(3):
        mine = segments[0] == number
        alone, alone_after = run(mixer, x[:, mine], rows(index=mine))
        close(packed[:, mine], alone)
    close(after, alone_after)
