"""Why a peer wins: a sentence for each place. `python benchmarks/pages.py --check` fails on a missing one.

A key is loss/kind, or narrower: loss/kind/peer, loss/kind/peer/dtype, loss/kind/peer/dtype/shape; the narrowest that
fits is printed. Kinds: forward, backward, both, no_grad, peak memory, kept memory, loss error, gradient error. Peers:
eager, compiled, liger. Write here what was looked into and found, without figures: those are in the row.
"""

KEEPS_THE_GRADIENT = (
    "One pass: the forward makes the gradient and keeps it, and lets student and teacher go, which as inputs are not "
    "counted. The peer keeps both and makes the gradient in its backward, as ours does with `one_pass=False`."
)
NEIGHBOURS = (
    "The two losses are neighbours among float32 numbers, and the order of the sum decides between them: ours is the "
    "peer's number at AVX2, where the order is another."
)

REASONS: dict[str, str] = {
    "temperature_kl/loss error/eager/float32/64x50257": NEIGHBOURS,
}
for _loss in ("pearson", "temperature_kl"):
    for _dtype in ("float32", "bfloat16"):
        REASONS[f"{_loss}/peak memory/compiled/{_dtype}"] = KEEPS_THE_GRADIENT
        REASONS[f"{_loss}/kept memory/compiled/{_dtype}"] = KEEPS_THE_GRADIENT
