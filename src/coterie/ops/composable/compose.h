// Composition across heads on tiles of scores, its transpose, and the gradients of the maps.
//
// A tile is x[t][n][TS]: for each query of a block, for each head, TS keys side by side, with a stride between queries
// that is no power of two. Everything here is a loop over columns of two vectors of keys. With `in` and `out` of rank R:
//     mixed[r] = Σ_n x[n]·in[r][n]        y[m] = x[m]·(1 + gates) + Σ_r mixed[r]·out[r][m] + Σ_n x[n]·static[n][m]
// for the query's part, whose maps are numbers of the row t, and the key's part, whose maps are vectors over the tile.
#pragma once

#include "_matrix.h"

namespace {

constexpr int TS = 64;  // keys per tile

// The maps at a row t (query part) and a tile (key part). Ranks are even; a part that does not exist is null.
template <class C>
struct Part {
    const C *in, *out, *gate;  // query: [rank][N], [rank][N], [N] with the identity added; key: the same times [TS]
    int rank;
};

template <class C>
struct Maps {
    const C *query, *key, *fixed;  // first row of the block; tile; (N, N)
    int query_rank, key_rank, N;

    i64 query_width() const { return query ? i64(2 * query_rank + 1) * N : 0; }
    i64 key_width() const { return key ? i64(2 * key_rank + 1) * N : 0; }
    Part<C> query_part(i64 t, bool transposed) const {
        return query ? part(query + t * query_width(), query_rank, 1, transposed) : Part<C>{nullptr, nullptr, nullptr, 0};
    }
    Part<C> key_part(bool transposed) const {
        return key ? part(key, key_rank, TS, transposed) : Part<C>{nullptr, nullptr, nullptr, 0};
    }

private:
    Part<C> part(const C* p, int rank, i64 unit, bool transposed) const {
        const C *first = p, *second = p + rank * N * unit;
        return {transposed ? second : first, transposed ? first : second, p + 2 * rank * N * unit, rank};
    }
};

// mixed[r] of one column for ranks p and p + 1 of either part
template <class C, bool Q, bool K>
inline void mix(const C* x, int N, const C* qin, const C* kin, vec<C> (&hq)[2][2], vec<C> (&hk)[2][2]) {
    constexpr int W = LANES<C>;
    for (int i = 0; i < 2; ++i)
        for (int v = 0; v < 2; ++v) hq[i][v] = hk[i][v] = vec<C>{};
    for (int n = 0; n < N; ++n) {
        const vec<C> a = at(x + n * TS), b = at(x + n * TS + W);
        if constexpr (Q) {
            for (int i = 0; i < 2; ++i) {
                hq[i][0] += qin[i * N + n] * a;
                hq[i][1] += qin[i * N + n] * b;
            }
        }
        if constexpr (K) {
            for (int i = 0; i < 2; ++i) {
                const C* k = kin + (i64(i) * N + n) * TS;
                hk[i][0] += at(k) * a;
                hk[i][1] += at(k + W) * b;
            }
        }
    }
}

// One row, ranks p and p + 1: y (+)= ...; keeps the mixed scores in h[query rank + key rank][TS] where h is given.
// y null: only those. ADD: y holds the sum over lower ranks already.
template <class C, bool Q, bool K, bool ADD>
inline void compose_row(const C* x, C* y, C* h, int N, int p, const Part<C>& q, const Part<C>& k) {
    constexpr int W = LANES<C>;
    const C *qin = Q ? q.in + i64(p) * N : nullptr, *qout = Q ? q.out + i64(p) * N : nullptr;
    for (int c = 0; c < TS; c += 2 * W) {
        vec<C> hq[2][2], hk[2][2];
        mix<C, Q, K>(x + c, N, qin, K ? k.in + i64(p) * N * TS + c : nullptr, hq, hk);
        if (h)
            for (int i = 0; i < 2; ++i)
                for (int v = 0; v < 2; ++v) {
                    if constexpr (Q) at(h + (p + i) * TS + c + v * W) = hq[i][v];
                    if constexpr (K) at(h + (q.rank + p + i) * TS + c + v * W) = hk[i][v];
                }
        if (!y) continue;
        const C* kout = K ? k.out + i64(p) * N * TS + c : nullptr;
        for (int m = 0; m < N; ++m) {
            vec<C> s[2];
            if constexpr (ADD) {
                for (int v = 0; v < 2; ++v) s[v] = at(y + m * TS + c + v * W);
            } else {
                const C one = q.gate ? q.gate[m] : C(1);
                for (int v = 0; v < 2; ++v) {
                    const vec<C> a = at(x + m * TS + c + v * W);
                    s[v] = k.gate ? a * (one + at(k.gate + m * TS + c + v * W)) : a * one;
                }
            }
            for (int i = 0; i < 2; ++i)
                for (int v = 0; v < 2; ++v) {
                    if constexpr (Q) s[v] += qout[i * N + m] * hq[i][v];
                    if constexpr (K) s[v] += at(kout + (i64(i) * N + m) * TS + v * W) * hk[i][v];
                }
            for (int v = 0; v < 2; ++v) at(y + m * TS + c + v * W) = s[v];
        }
    }
}

template <class C, bool ADD>
inline void compose_row(const C* x, C* y, C* h, int N, int p, const Part<C>& q, const Part<C>& k) {
    if (p < q.rank)
        p < k.rank ? compose_row<C, true, true, ADD>(x, y, h, N, p, q, k) : compose_row<C, true, false, ADD>(x, y, h, N, p, q, k);
    else
        p < k.rank ? compose_row<C, false, true, ADD>(x, y, h, N, p, q, k) : compose_row<C, false, false, ADD>(x, y, h, N, p, q, k);
}

// y = compose(x), or its transpose applied to x, for `rows` queries; x and y are different memory.
template <class C>
void compose(const Maps<C>& maps, bool transposed, const C* x, C* y, C* h, i64 hstride, int rows, i64 stride) {
    const int N = maps.N;
    const Part<C> k = maps.key_part(transposed);
    for (int t = 0; t < rows; ++t) {
        const Part<C> q = maps.query_part(t, transposed);
        const C* from = x + t * stride;
        C *to = y ? y + t * stride : nullptr, *keep = h ? h + t * hstride : nullptr;
        compose_row<C, false>(from, to, keep, N, 0, q, k);
        for (int p = 2; p < std::max(q.rank, k.rank); p += 2) compose_row<C, true>(from, to, keep, N, p, q, k);
        if (maps.fixed && y) multiply<C, true>(maps.fixed, transposed ? N : 1, transposed ? 1 : N, from, TS, to, TS, N, TS, N);
    }
}

// Gradients of the maps of y = compose(x), from x, dy, the mixed scores h of x and dh of dy (under the transposed maps):
//     d out[r][m] = Σ h[r]·dy[m]     d in[r][n] = Σ dh[r]·x[n]     d gate[m] = Σ x[m]·dy[m]     d static[n][m] = Σ x[n]·dy[m]
// Σ is over the keys of the tile for the query's part, lane by lane into sums[t][2 rank + 1][N][W].
template <class C>
void query_gradient(const Maps<C>& maps, const C* x, const C* dy, const C* h, const C* dh, i64 hstride, C* sums, int rows, i64 stride) {
    constexpr int W = LANES<C>;
    const int N = maps.N, rank = maps.query_rank;
    if (!maps.query) return;
    for (int t = 0; t < rows; ++t, sums += maps.query_width() * W)
        for (int m = 0; m < N; ++m) {
            const C *a = x + t * stride + m * TS, *g = dy + t * stride + m * TS;
            auto sum = [&](int row) -> vec<C>& { return at(sums + (i64(row) * N + m) * W); };
            vec<C> gate = sum(2 * rank);
            if (rank == 0)
                for (int c = 0; c < TS; c += W) gate += at(a + c) * at(g + c);
            for (int p = 0; p < rank; p += 2) {
                const C *hp = h + t * hstride + p * TS, *dhp = dh + t * hstride + p * TS;
                vec<C> in0 = sum(p), in1 = sum(p + 1), out0 = sum(rank + p), out1 = sum(rank + p + 1);
                for (int c = 0; c < TS; c += W) {
                    const vec<C> u = at(a + c), w = at(g + c);
                    in0 += at(dhp + c) * u;
                    in1 += at(dhp + TS + c) * u;
                    out0 += at(hp + c) * w;
                    out1 += at(hp + TS + c) * w;
                    if (p == 0) gate += u * w;
                }
                sum(p) = in0;
                sum(p + 1) = in1;
                sum(rank + p) = out0;
                sum(rank + p + 1) = out1;
            }
            sum(2 * rank) = gate;
        }
}

// Σ is over the queries of the block for the key's part, into sums[2 rank + 1][N][TS].
template <class C>
void key_gradient(const Maps<C>& maps, const C* x, const C* dy, const C* h, const C* dh, i64 hstride, C* sums, int rows, i64 stride) {
    constexpr int W = LANES<C>;
    const int N = maps.N, rank = maps.key_rank;
    if (!maps.key) return;
    h += maps.query_rank * TS;
    dh += maps.query_rank * TS;
    for (int c = 0; c < TS; c += 2 * W)
        for (int m = 0; m < N; ++m) {
            const C *a = x + m * TS + c, *g = dy + m * TS + c;
            auto sum = [&](int row) { return sums + (i64(row) * N + m) * TS + c; };
            vec<C> gate[2] = {at(sum(2 * rank)), at(sum(2 * rank) + W)};
            if (rank == 0)
                for (int t = 0; t < rows; ++t)
                    for (int v = 0; v < 2; ++v) gate[v] += at(a + t * stride + v * W) * at(g + t * stride + v * W);
            for (int p = 0; p < rank; p += 2) {
                vec<C> in[2][2], out[2][2];
                for (int i = 0; i < 2; ++i)
                    for (int v = 0; v < 2; ++v) {
                        in[i][v] = at(sum(p + i) + v * W);
                        out[i][v] = at(sum(rank + p + i) + v * W);
                    }
                for (int t = 0; t < rows; ++t) {
                    const C *hp = h + t * hstride + p * TS + c, *dhp = dh + t * hstride + p * TS + c;
                    for (int v = 0; v < 2; ++v) {
                        const vec<C> u = at(a + t * stride + v * W), w = at(g + t * stride + v * W);
                        for (int i = 0; i < 2; ++i) {
                            in[i][v] += at(dhp + i * TS + v * W) * u;
                            out[i][v] += at(hp + i * TS + v * W) * w;
                        }
                        if (p == 0) gate[v] += u * w;
                    }
                }
                for (int i = 0; i < 2; ++i)
                    for (int v = 0; v < 2; ++v) {
                        at(sum(p + i) + v * W) = in[i][v];
                        at(sum(rank + p + i) + v * W) = out[i][v];
                    }
            }
            for (int v = 0; v < 2; ++v) at(sum(2 * rank) + v * W) = gate[v];
        }
}

// Σ is over both for the static part, lane by lane into sums[N][N][W].
template <class C>
void fixed_gradient(const Maps<C>& maps, const C* x, const C* dy, C* sums, int rows, i64 stride) {
    constexpr int W = LANES<C>;
    const int N = maps.N;
    if (!maps.fixed) return;
    for (int t = 0; t < rows; ++t)
        for (int n = 0; n < N; ++n)
            for (int m = 0; m < N; ++m) {
                const C *a = x + t * stride + n * TS, *g = dy + t * stride + m * TS;
                vec<C> sum = at(sums + (i64(n) * N + m) * W);
                for (int c = 0; c < TS; c += W) sum += at(a + c) * at(g + c);
                at(sums + (i64(n) * N + m) * W) = sum;
            }
}

}  // namespace
