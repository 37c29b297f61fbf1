"""decode_attention against PyTorch's sdpa, one thread: python bench/attention.py"""

from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from speckv.kernels import decode_attention

HEADS, GROUPS, SIZE = 9, 3, 64  # SmolLM2's
CASES = [(1, 300, 1), (1, 300, 3), (1, 300, 9), (1, 1000, 1), (128, 200, 1), (128, 500, 1)]  # rows, positions, tokens
REPEATS = 30


def milliseconds(function):
    """Median of a call, after two to warm up."""
    times = []
    for _ in range(REPEATS + 2):
        started = perf_counter()
        function()
        times.append(1e3 * (perf_counter() - started))
    return sorted(times[2:])[REPEATS // 2]


def main():
    torch.set_num_threads(1)
    table = Table(title="attention of the last tokens of a sequence, ms a layer")
    for column in ("dtype", "rows", "positions", "tokens", "decode_attention", "sdpa"):
        table.add_column(column, justify="right")
    for dtype in (torch.bfloat16, torch.float32):
        for rows, positions, tokens in CASES:
            key, value = torch.randn(2, rows, GROUPS, positions, SIZE).to(dtype)
            query = torch.randn(rows, HEADS, tokens, SIZE).to(dtype)
            mask = torch.ones(tokens, positions, dtype=torch.bool).tril(positions - tokens)

            def own(query=query, key=key, value=value):
                return decode_attention(query, key, value, SIZE ** -0.5)

            def rival(query=query, key=key, value=value, mask=mask):  # as transformers calls it
                if query.shape[2] == 1:
                    return scaled_dot_product_attention(query, key, value, enable_gqa=True)
                key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
                return scaled_dot_product_attention(query, key, value, attn_mask=mask)
            torch.testing.assert_close(own().transpose(1, 2), rival(), rtol=0.02, atol=0.02)
            ours, theirs = milliseconds(own), milliseconds(rival)
            table.add_row(str(dtype).removeprefix("torch."), str(rows), str(positions), str(tokens), f"{ours:.3f}",
                          f"{theirs:.3f} ({theirs / ours:.1f}×)")
    Console().print(table)


if __name__ == "__main__":
    main()
