// The backward pass: the weights are recomputed from the saved log-sum-exp.
//
// Per block of queries and tile of keys, with P the weights, O' the composed ones, and transposed maps written ᵀ:
//     first   S = q·kᵀ   P = exp(compose(S; pre) - lse)   dO' = dy·vᵀ   dP = composeᵀ(dO'; post)   δ += Σ_s P·dP
//             dv += compose(P; post)ᵀ·dy   and the gradients of post
//     then    dL = P·(dP - δ)   dS = composeᵀ(dL; pre)   dq += dS·k   dk += dSᵀ·q   and the gradients of pre
// S, P and dP of a block wait in a scratch buffer, as δ needs all keys. Threads work on neighbouring blocks at once; what
// belongs to keys (dk, dv, the key's maps) they add up in shared memory, tile by tile in the order of the blocks: a block
// waits until the one before it has left the tile. So there is one copy, no atomic sum, and one order.
#pragma once

#include <atomic>
#include <thread>

#include "tiles.h"

namespace {

// How far each block has come, in tiles, for one of the two phases.
class Progress {
    std::unique_ptr<std::atomic<i64>[]> done;

public:
    explicit Progress(i64 n) : done(new std::atomic<i64>[std::size_t(n)]) {}
    void set(i64 i, i64 tiles) { done[std::size_t(i)].store(tiles, std::memory_order_release); }
    void wait(i64 i, i64 tiles) const {
        for (int turns = 0; done[std::size_t(i)].load(std::memory_order_acquire) < tiles; ++turns)
            if (turns > 100) std::this_thread::yield();
    }
};

// Gradients of one side's maps: query (B, Lq, 2 rank + 1, H), key (B, tiles, 2 rank + 1, H, TS), fixed (H, H).
template <class C>
struct Gradients {
    C *query, *key, *fixed;
};

// weight = exp(x - lse)
template <class C>
inline void weigh(const C* x, C* weight, const C* lse, int N, int rows, i64 stride) {
    for (int t = 0; t < rows; ++t)
        for (int n = 0; n < N; ++n)
            for (i64 c = t * stride + n * TS; c < t * stride + (n + 1) * TS; c += LANES<C>)
                at(weight + c) = exponential(at(x + c) - lse[t * N + n]);
}

// δ, lane by lane; `kept` becomes a copy of y.
template <class C>
inline void add_products(const C* x, const C* y, C* kept, C* sums, int N, int rows, i64 stride) {
    constexpr int W = LANES<C>;
    for (int t = 0; t < rows; ++t)
        for (int n = 0; n < N; ++n) {
            vec<C>& sum = at(sums + (t * N + n) * W);
            for (i64 c = t * stride + n * TS; c < t * stride + (n + 1) * TS; c += W) {
                const vec<C> g = at(y + c);
                at(kept + c) = g;
                sum += at(x + c) * g;
            }
        }
}

// dx = weight·(dy - δ)
template <class C>
inline void through_softmax(const C* weight, const C* dy, const C* delta, C* dx, int N, int rows, i64 stride) {
    for (int t = 0; t < rows; ++t)
        for (int n = 0; n < N; ++n)
            for (i64 c = t * stride + n * TS; c < t * stride + (n + 1) * TS; c += LANES<C>)
                at(dx + c) = at(weight + c) * (at(dy + c) - delta[t * N + n]);
}

// out[head][TS][ld] += xᵀ·panels of all heads
template <class C>
inline void add_to_keys(const C* x, const C* panels, C* out, int N, int group, int m, int R, int ld, i64 stride) {
    const i64 size = i64(TS) * ld;
    for (int n = 0; n < N; ++n) {
        C* y = out + n / group * size;
        multiply_panels<C, true>(x + n * TS, 1, stride, panels + i64(n) * R * ld, ld / (2 * LANES<C>), y, ld, TS, m, y + size, size * i64(sizeof(C)));
    }
}

template <class C>
inline void sum_lanes(const C* x, C* out, i64 n) {
    for (i64 i = 0; i < n; ++i) out[i] = horizontal_sum<C>(at(x + i * LANES<C>));
}

template <class T, class C>
int backward(const T* g, const T* q, const T* k, const T* v, const Sides<C>& pre, const Sides<C>& post, const Gradients<C>& dpre,
             const Gradients<C>& dpost, const Mask& mask, const C* lse, T* dq, T* dk, T* dv, const Shape& s, const i64* gs, const i64* qs,
             const i64* ks, const i64* vs, double scale, int threads) {
    constexpr int W = LANES<C>;
    const int N = int(s.H), group = int(s.H / s.HK), R = s.rows, dp = panels<C>(s.d), vp = panels<C>(s.dv);
    const i64 stride = i64(N) * TS + 2 * W, tile = R * stride, J = s.tiles(), blocks = s.blocks();
    const i64 ktsize = i64(TS) * s.d, vtsize = i64(TS) * s.dv, ksize = i64(TS) * dp, vsize = i64(TS) * vp;
    const auto all = [&](i64 size) { return std::size_t(s.B * J * s.HK * size); };
    Lent<1> shared(bytes_of<C>({all(ktsize), all(vtsize), all(ksize), all(ksize), all(vsize), std::size_t(2 * s.B * blocks) * N * N}));
    C *kt = shared.take<C>(all(ktsize)), *vt = shared.take<C>(all(vtsize)), *kr = shared.take<C>(all(ksize));
    C *dks = shared.take<C>(all(ksize)), *dvs = shared.take<C>(all(vsize)), *fixed = shared.take<C>(std::size_t(2 * s.B * blocks) * N * N);
    pack_all(s, k, ks, kt, ktsize, threads, [&](const T* x, i64 st, int n, C* o) { pack_transposed(x, st, n, s.d, o); });
    pack_all(s, v, vs, vt, vtsize, threads, [&](const T* x, i64 st, int n, C* o) { pack_transposed(x, st, n, s.dv, o); });
    pack_all(s, k, ks, kr, ksize, threads, [&](const T* x, i64 st, int n, C* o) { pack_panels(x, st, n, TS, s.d, C(1), o); });
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 item = 0; item < s.B * J * s.HK; ++item) {
        std::fill(dks + item * ksize, dks + (item + 1) * ksize, C(0));
        std::fill(dvs + item * vsize, dvs + (item + 1) * vsize, C(0));
    }

    // Blocks are taken in this order: from the last to the first, as those have most keys, all batches side by side.
    const auto block_of = [&](i64 item) { return blocks - 1 - item / s.B; };
    const auto first_tile = [&](i64 i) { return s.low(i * R) / TS; };
    const auto end_tile = [&](i64 i) { return (s.high(std::min(s.Lq, (i + 1) * R) - 1) + TS - 1) / TS; };
    i64 longest = 0;
    for (i64 i = 0; i < blocks; ++i) longest = std::max(longest, end_tile(i) - first_tile(i));
    Progress first(s.B * blocks), second(s.B * blocks);
    for (i64 item = 0; item < s.B * blocks; ++item) {
        first.set(item, first_tile(block_of(item)));
        second.set(item, first_tile(block_of(item)));
    }
    const int pre_rank = pre.query_rank + pre.key_rank, post_rank = post.query_rank + post.key_rank;
    const i64 hstride = i64(std::max(pre_rank, post_rank)) * TS + 2 * W;
    const i64 pre_width = pre.query ? (2 * pre.query_rank + 1) * N : 0, post_width = post.query ? (2 * post.query_rank + 1) * N : 0;
    std::atomic<i64> next(0);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    try {
        const auto u = [](i64 n) { return std::size_t(n); };
        const i64 lanes = i64(R) * N * W, fixed_lanes = i64(N) * N * W;
        Lent<0> w(bytes_of<C>({u(longest * tile), u(longest * tile), u(longest * tile), u(tile), u(tile), u(tile), u(R * hstride), u(R * hstride),
                                 u(R * N * s.d), u(R * N * dp), u(R * N * s.dv), u(R * N * vp), u(R * N * dp), u(R * TS), u(R * N), u(lanes),
                                 u(R * N), u(R * pre_width * W), u(R * post_width * W), u(fixed_lanes), u(fixed_lanes), u(longest)}));
        C *scores = w.take<C>(u(longest * tile)), *weights = w.take<C>(u(longest * tile)), *slopes = w.take<C>(u(longest * tile));
        C *x = w.take<C>(u(tile)), *y = w.take<C>(u(tile)), *z = w.take<C>(u(tile)), *h = w.take<C>(u(R * hstride)), *dh = w.take<C>(u(R * hstride));
        C *qr = w.take<C>(u(R * N * s.d)), *qp = w.take<C>(u(R * N * dp)), *gr = w.take<C>(u(R * N * s.dv)), *gp = w.take<C>(u(R * N * vp));
        C *dqs = w.take<C>(u(R * N * dp)), *bias = w.take<C>(u(R * TS)), *norm = w.take<C>(u(R * N)), *sums = w.take<C>(u(lanes));
        C *delta = w.take<C>(u(R * N)), *dpre_query = w.take<C>(u(R * pre_width * W)), *dpost_query = w.take<C>(u(R * post_width * W));
        C *dpre_fixed = w.take<C>(u(fixed_lanes)), *dpost_fixed = w.take<C>(u(fixed_lanes));
        std::uint8_t* seen = w.take<std::uint8_t>(u(longest));
        for (i64 item; (item = next.fetch_add(1)) < s.B * blocks;) {
            const i64 b = item % s.B, i = block_of(item), t0 = i * R, j0 = first_tile(i), j1 = end_tile(i), before = item - s.B;
            const int m = int(std::min<i64>(R, s.Lq - t0));
            for (int n = 0; n < N; ++n) {
                const T *from = q + b * qs[0] + n * qs[1] + t0 * qs[2], *slope = g + b * gs[0] + n * gs[1] + t0 * gs[2];
                pack_rows(from, qs[2], m, s.d, C(scale), qr + i64(n) * R * s.d, s.d);
                pack_panels(from, qs[2], m, m, s.d, C(scale), qp + i64(n) * R * dp);
                pack_rows(slope, gs[2], m, s.dv, C(1), gr + i64(n) * R * s.dv, s.dv);
                pack_panels(slope, gs[2], m, m, s.dv, C(1), gp + i64(n) * R * vp);
                for (int t = 0; t < m; ++t) {
                    const C l = lse[(b * N + n) * s.Lq + t0 + t];
                    norm[t * N + n] = l == -INF<C> ? INF<C> : l;
                }
            }
            std::fill(sums, sums + lanes, C(0));
            std::fill(dqs, dqs + i64(R) * N * dp, C(0));
            std::fill(dpre_query, dpre_query + R * pre_width * W, C(0));
            std::fill(dpost_query, dpost_query + R * post_width * W, C(0));
            std::fill(dpre_fixed, dpre_fixed + fixed_lanes, C(0));
            std::fill(dpost_fixed, dpost_fixed + fixed_lanes, C(0));

            for (i64 j = j0; j < j1; ++j) {
                const Cover c = cover(s, mask, b, t0, m, j, bias);
                seen[j - j0] = c != NONE;
                if (c == NONE) continue;
                C* weight = weights + (j - j0) * tile;
                const i64 place = (b * J + j) * s.HK;
                score(qr, kt + place * ktsize, ktsize, x, N, group, m, R, s.d, stride);
                std::copy(x, x + m * stride, scores + (j - j0) * tile);
                compose<C>(pre.at_block(s, b, t0, j), false, x, y, nullptr, 0, m, stride);
                if (c == SOME) apply(bias, y, N, m, stride);
                weigh(y, weight, norm, N, m, stride);
                score(gr, vt + place * vtsize, vtsize, x, N, group, m, R, s.dv, stride);
                const Maps<C> maps = post.at_block(s, b, t0, j);
                compose<C>(maps, false, weight, y, h, hstride, m, stride);
                compose<C>(maps, true, x, z, dh, hstride, m, stride);
                add_products(weight, z, slopes + (j - j0) * tile, sums, N, m, stride);
                query_gradient(maps, weight, x, h, dh, hstride, dpost_query, m, stride);
                fixed_gradient(maps, weight, x, dpost_fixed, m, stride);
                if (before >= 0) first.wait(before, j + 1);
                key_gradient(maps, weight, x, h, dh, hstride, dpost.key + (b * J + j) * maps.key_width() * TS, m, stride);
                add_to_keys(y, gp, dvs + place * vsize, N, group, m, R, vp, stride);
                first.set(item, j + 1);
            }
            if (before >= 0) first.wait(before, j1);
            first.set(item, j1);

            sum_lanes(sums, delta, i64(m) * N);
            for (i64 j = j0; j < j1; ++j) {
                if (!seen[j - j0]) continue;
                const C* score_j = scores + (j - j0) * tile;
                const i64 place = (b * J + j) * s.HK;
                const Maps<C> maps = pre.at_block(s, b, t0, j);
                through_softmax(weights + (j - j0) * tile, slopes + (j - j0) * tile, delta, y, N, m, stride);
                if (pre_rank) compose<C>(maps, false, score_j, nullptr, h, hstride, m, stride);
                compose<C>(maps, true, y, x, dh, hstride, m, stride);
                query_gradient(maps, score_j, y, h, dh, hstride, dpre_query, m, stride);
                fixed_gradient(maps, score_j, y, dpre_fixed, m, stride);
                for (int n = 0; n < N; ++n) {
                    const C* panel = kr + (place + n / group) * ksize;
                    multiply_panels<C, true>(x + n * TS, stride, 1, panel, dp / (2 * W), dqs + i64(n) * R * dp, dp, m, TS, panel + ksize,
                                             ksize * i64(sizeof(C)));
                }
                if (before >= 0) second.wait(before, j + 1);
                key_gradient(maps, score_j, y, h, dh, hstride, dpre.key + (b * J + j) * maps.key_width() * TS, m, stride);
                add_to_keys(x, qp, dks + place * ksize, N, group, m, R, dp, stride);
                second.set(item, j + 1);
            }
            if (before >= 0) second.wait(before, j1);
            second.set(item, j1);

            for (int n = 0; n < N; ++n)
                for (int t = 0; t < m; ++t)
                    for (int e = 0; e < s.d; ++e)
                        store(dq + ((b * N + n) * s.Lq + t0 + t) * s.d + e, dqs[(i64(n) * R + t) * dp + e] * C(scale));
            if (pre_width) sum_lanes(dpre_query, dpre.query + (b * s.Lq + t0) * pre_width, m * pre_width);
            if (post_width) sum_lanes(dpost_query, dpost.query + (b * s.Lq + t0) * post_width, m * post_width);
            if (pre.fixed) sum_lanes(dpre_fixed, fixed + 2 * item * N * N, i64(N) * N);
            if (post.fixed) sum_lanes(dpost_fixed, fixed + (2 * item + 1) * N * N, i64(N) * N);
        }
    } catch (const std::bad_alloc&) { failed |= 1; }
    if (failed) return NO_MEMORY;

    for (i64 item = 0; item < s.B * blocks; ++item)
        for (i64 e = 0; e < i64(N) * N; ++e) {
            if (pre.fixed) dpre.fixed[e] += fixed[2 * item * N * N + e];
            if (post.fixed) dpost.fixed[e] += fixed[(2 * item + 1) * N * N + e];
        }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 item = 0; item < s.B * J * s.HK; ++item) {
        const i64 head = item % s.HK, j = item / s.HK % J, b = item / s.HK / J;
        for (i64 r = 0; r < std::min<i64>(TS, s.Lk - j * TS); ++r) {
            const i64 row = (b * s.HK + head) * s.Lk + j * TS + r;
            for (int e = 0; e < s.d; ++e) store(dk + row * s.d + e, dks[item * ksize + r * dp + e]);
            for (int e = 0; e < s.dv; ++e) store(dv + row * s.dv + e, dvs[item * vsize + r * vp + e]);
        }
    }
    return OK;
}

}  // namespace
