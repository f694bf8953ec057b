"""Which prototypes a teacher's token belongs to: a softmax around a centre.

A token with logits z is assigned q = softmax((z - c) / tau). Sinkhorn-Knopp is of that form: it scales rows and columns
of exp(z / tau), and the row scales a_k are a centre, c_k = -tau log a_k. So a centre balanced on many tiles can be kept
and used on batches of any size, and a batch is balanced without its (tokens x prototypes) matrix in memory.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from pathokd.processes import world_size

SINKHORN_ITERATIONS = 3
"""As DINOv2 and DINOv3 do."""
TOKENS_PER_PROTOTYPE = 1 / 32
"""Least tokens per prototype that Sinkhorn-Knopp is allowed on (`check_sinkhorn`)."""
CHUNK_ELEMENTS = 1 << 23
"""Logits held at a time, 32 MiB in fp32: all of iBOT at K = 131,072 goes through 64 tokens at a time."""


def chunk_rows(prototypes: int, elements: int = CHUNK_ELEMENTS) -> int:
    """Tokens whose logits are held at a time."""
    return max(1, elements // prototypes)


def assign(
    logits: Float[Tensor, "tokens prototypes"], centre: Float[Tensor, " prototypes"], temperature: float
) -> Float[Tensor, "tokens prototypes"]:
    """Shares of each token among the prototypes, softmax((z - c) / tau)."""
    return ((logits - centre) / temperature).softmax(-1)


def check_sinkhorn(tokens: int, prototypes: int) -> None:
    """Refuse Sinkhorn-Knopp on too few tokens.

    Balancing makes every prototype equally used. With n tokens far below K prototypes each token is handed K/n of them
    almost evenly, and what the teacher knew is gone.

    Args:
        tokens: of all processes together.
        prototypes: K.

    Raises:
        ValueError: fewer than K/32 tokens.
    """
    least = prototypes * TOKENS_PER_PROTOTYPE
    if tokens < least:
        raise ValueError(
            f"Sinkhorn-Knopp over {tokens} tokens would spread each evenly over {prototypes} prototypes: it needs at "
            f"least {least:.0f} (K / 32); take centring: frozen, larger batches or fewer prototypes."
        )


def sinkhorn_centre(
    tokens: Float[Tensor, "tokens dim"],
    prototypes: Float[Tensor, "prototypes dim"],
    temperature: float,
    iterations: int = SINKHORN_ITERATIONS,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Float[Tensor, " prototypes"]:
    """The centre with which `assign` gives the result of Sinkhorn-Knopp over all tokens of all processes.

    Args:
        tokens: vectors whose products with the prototypes are the logits.
        prototypes: K of them.
        temperature: tau of the assignment.
        iterations: see `balanced_centres`.
        chunk_elements: logits held at a time.
    """
    return balanced_centres(lambda: [tokens], prototypes, [temperature], iterations, chunk_elements)[0]


@torch.no_grad()
def balanced_centres(
    blocks: Callable[[], Iterable[Float[Tensor, "rows dim"]]],
    prototypes: Float[Tensor, "prototypes dim"],
    temperatures: Sequence[float],
    iterations: int = SINKHORN_ITERATIONS,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Float[Tensor, "temperatures prototypes"]:
    """Sinkhorn-Knopp's centres over any number of tokens, at several temperatures.

    In the log domain, so nothing overflows; in the dtype of the tokens, whatever the autocast. Each iteration goes
    through the tokens and computes their logits anew, some rows at a time: memory beyond the arguments is about four
    times `chunk_elements` numbers.

    Args:
        blocks: gives all tokens, block by block, each time it is called.
        prototypes: K of them; a token's products with them are its logits.
        temperatures: tau of the assignments.
        iterations: of row and column scaling; the last column scaling is the softmax of `assign`.
        chunk_elements: logits held at a time.

    Returns:
        Centres of mean zero.

    Reference:
        Caron et al. 2020, "SwAV" (arXiv 2006.09882), section 3.1; Cuturi 2013 (arXiv 1306.0895), Alg. 1.
    """
    log_a = prototypes.new_zeros(len(temperatures), len(prototypes))
    for iteration in range(iterations):
        # log a_k = -log sum_i exp(z_ik / tau + log b_i),  log b_i = -log sum_k exp(z_ik / tau + log a_k);  first b = 1
        rows = torch.full_like(log_a, -torch.inf)
        for block in blocks():
            for part in torch.split(block, chunk_rows(len(prototypes), chunk_elements)):
                with torch.autocast(part.device.type, enabled=False):
                    logits = part @ prototypes.T
                for tau, a, row in zip(temperatures, log_a, rows, strict=True):
                    z = logits / tau
                    if iteration:
                        z -= (z + a).logsumexp(1, keepdim=True)
                    row.copy_(torch.logaddexp(row, z.logsumexp(0)))
        log_a = -_across_processes(rows)
        log_a -= log_a.mean(1, keepdim=True)
    return -log_a * log_a.new_tensor(temperatures)[:, None]


def _across_processes(log_sums: Tensor) -> Tensor:
    """log of the sum over processes of exp(log_sums); the identity in a single process."""
    if world_size() == 1:
        return log_sums
    largest = log_sums.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = (log_sums - largest).exp()
    dist.all_reduce(total)
    return total.log() + largest


def token_count(tokens: Tensor) -> int:
    """Tokens of all processes, which see equally many each."""
    return len(tokens) * world_size()
