"""`HeadComposition`: how every head takes from every other, for one use of the composition."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class HeadComposition(NamedTuple):
    """A map over the heads that differs per pair of query t and key s, as a sum of cheap parts, each of them optional.

        A'[m] = A[m] + Σ_n A[n]·static[n,m] + Σ_r (Σ_n A[n]·query_in[t,r,n])·query_out[t,r,m] + A[m]·query_gate[t,m]
                                            + Σ_r (Σ_n A[n]·key_in[s,r,n])·key_out[s,r,m]     + A[m]·key_gate[s,m]

    Heads are those of the query. `query_in` and `query_out` are given together or not at all, so are `key_in` and
    `key_out`. Without any part the map is the identity.

    Attributes:
        query_in, query_out: (batch, queries, rank, heads).
        query_gate: (batch, queries, heads).
        key_in, key_out: (batch, keys, rank, heads); their rank may be another than the query's.
        key_gate: (batch, keys, heads).
        static: (heads in, heads out).
    """

    query_in: Float[Tensor, "batch queries rank heads"] | None = None
    query_out: Float[Tensor, "batch queries rank heads"] | None = None
    query_gate: Float[Tensor, "batch queries heads"] | None = None
    key_in: Float[Tensor, "batch keys key_rank heads"] | None = None
    key_out: Float[Tensor, "batch keys key_rank heads"] | None = None
    key_gate: Float[Tensor, "batch keys heads"] | None = None
    static: Float[Tensor, "heads_in heads_out"] | None = None
