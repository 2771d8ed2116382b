"""Why a peer wins: a sentence for each place. `python benchmarks/pages.py --check` fails on a missing one,
and on one that no row needs.

A key is loss/kind, or narrower: loss/kind/peer, loss/kind/peer/dtype, loss/kind/peer/dtype/shape; the narrowest that
fits is printed. Kinds: forward, backward, both, no_grad, peak memory, kept memory, loss error, gradient error. Peers:
eager, compiled, liger. Write here what was looked into and found, without figures: those are in the row.
"""

KEEPS_THE_GRADIENT = (
    "One pass: the forward makes the gradient and keeps it, and lets student and teacher go, which as inputs are not "
    "counted. The peer keeps both and makes the gradient in its backward, as ours does with `one_pass=False`, but for "
    "a few numbers per row or channel."
)
ONE_ROUNDING = (
    "Errors of about one rounding of float32, where the order of the sum decides: a kernel adds its vectors' lanes, "
    "the peer another way."
)
FEW_ROUNDINGS = "A few roundings of float32 in either; a row's exponentials are summed in another order."
CALL = (
    "Small inputs: the fixed cost of a call, which checks its arguments and goes through PyTorch's dispatcher in "
    "Python, is larger than the arithmetic. A compiled graph has a guard instead, the bare formula nothing. The bound "
    "is what each loss takes at its smallest shape, below: there hardly anything else is measured."
)
GRADIENT_TOO = (
    "One pass: our forward makes the gradient as well, and the backward hands it on. Forward plus backward is what "
    "compares like with like."
)
READS_ONCE = (
    "Both read student and teacher once and write nothing; what is left between them is less than their spreads."
)
KEEPS_A_BYTE = (
    "One pass: the forward makes the gradient and keeps it. The peer keeps a byte per row, on which side of the bound "
    "it is, and in its backward computes the rest again from the inputs, which are not counted. `one_pass=False` "
    "would not help: there ours keeps the derivative in float32."
)
FLAT_BOXES = "A few kilobytes: lists of boxes are brought into one tensor, which the loop does not need."

REASONS: dict[str, str] = {
    "masked_mse/forward": GRADIENT_TOO,
    "masked_mse/forward/eager": CALL,
    "masked_mse/no_grad/compiled": READS_ONCE,
    "masked_mse/no_grad/compiled/float32/2x256x13x21": CALL,
    "masked_mse/no_grad/compiled/bfloat16/2x256x13x21": CALL,
    "temperature_kl/forward/eager": CALL,
    "temperature_kl/no_grad/eager": CALL,
    "temperature_kl/loss error": ONE_ROUNDING,
    "decoupled_kl/gradient error": FEW_ROUNDINGS,
    "soft_cross_entropy/forward/eager": CALL,
    "soft_cross_entropy/no_grad/eager": CALL,
    "soft_cross_entropy/no_grad/compiled/float32/512x21": CALL,
    "soft_cross_entropy/no_grad/compiled/bfloat16/512x21": CALL,
    "soft_cross_entropy/gradient error": FEW_ROUNDINGS,
    "detection_distillation_heads/no_grad/eager": CALL,
    "masks/peak memory": FLAT_BOXES,
    "pearson/peak memory": KEEPS_THE_GRADIENT,
    "pearson/kept memory": KEEPS_THE_GRADIENT,
    "temperature_kl/kept memory": KEEPS_THE_GRADIENT,
    "soft_cross_entropy/kept memory": KEEPS_THE_GRADIENT,
    "binary_kl/peak memory": KEEPS_THE_GRADIENT,
    "binary_kl/kept memory": KEEPS_THE_GRADIENT,
    "bounded_regression/peak memory": KEEPS_A_BYTE,
    "bounded_regression/kept memory": KEEPS_A_BYTE,
}
