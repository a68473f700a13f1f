// Dynamic group attention on the CPU: group and select in one pass each, attend group by group, never hold more than a tile of scores.
//
// Plain C++17 with GCC/Clang vector extensions and OpenMP, no torch headers: compiles in seconds, called through ctypes.
// Layout of all token tensors: element (b, h, t, i) at b*strides[0] + h*strides[1] + t*strides[2] + i. Arithmetic is float (double for
// double tensors). Work is cut into pieces that do not depend on the number of threads, and sums run in a fixed order:
// results are the same bits for any number of threads.

#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "gather.h"
#include "groups.h"

namespace {

constexpr int TILE = 48;     // queries per tile: scores of a tile stay in the first-level caches
constexpr int CHUNK = 1024;  // queries per piece of work: a giant group is shared among threads

// ---------------------------------------------------------------------------------------------------------------- pieces of work
struct Shape {
    i64 B, H, Lq, Lk;
    int d, dv, G, K;
};

struct Piece {
    i64 bh;
    int group;
    i64 from, to;  // positions in the sorted order of the queries of (b, h)
};

// Counting sort of the queries of every (b, h) by group, and the pieces of at most CHUNK queries of one group.
int plan(const Shape& s, const i64* assignment, const i64* selected, std::vector<std::int32_t>& order, std::vector<Piece>& pieces, int threads) {
    order.resize(std::size_t(s.B * s.H * s.Lq));
    std::vector<i64> start(std::size_t(s.B * s.H * (s.G + 1)));
    int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad)
    for (i64 bh = 0; bh < s.B * s.H; ++bh) {
        const i64* a = assignment + bh * s.Lq;
        i64* first = &start[std::size_t(bh * (s.G + 1))];
        bool valid = true;
        for (i64 t = 0; t < s.Lq && valid; ++t) valid = a[t] >= 0 && a[t] < s.G;
        if (!valid) { bad |= BAD_ASSIGNMENT; continue; }
        const i64* chosen = selected + bh * s.G * s.K;
        for (i64 i = 0; i < i64(s.G) * s.K; ++i) valid = valid && chosen[i] >= 0 && chosen[i] < s.Lk;
        if (!valid) { bad |= BAD_SELECTED; continue; }
        for (i64 t = 0; t < s.Lq; ++t) ++first[a[t] + 1];
        for (int g = 0; g < s.G; ++g) first[g + 1] += first[g];
        std::vector<i64> next(first, first + s.G);
        for (i64 t = 0; t < s.Lq; ++t) order[std::size_t(bh * s.Lq + next[std::size_t(a[t])]++)] = std::int32_t(t);
    }
    if (bad) return bad & BAD_ASSIGNMENT ? BAD_ASSIGNMENT : BAD_SELECTED;
    for (i64 bh = 0; bh < s.B * s.H; ++bh)
        for (int g = 0; g < s.G; ++g) {
            const i64* first = &start[std::size_t(bh * (s.G + 1))];
            for (i64 t = first[g]; t < first[g + 1]; t += CHUNK) pieces.push_back({bh, g, t, std::min<i64>(first[g + 1], t + CHUNK)});
        }
    return OK;
}

// The keys of a group that may be attended to; returns their number.
inline int gather_indices(const Shape& s, const i64* selected, const std::uint8_t* mask, const Piece& p, std::int32_t* out) {
    const i64* chosen = selected + (p.bh * s.G + p.group) * s.K;
    const std::uint8_t* m = mask ? mask + p.bh / s.H * s.Lk : nullptr;
    int n = 0;
    for (int j = 0; j < s.K; ++j)
        if (!m || m[chosen[j]]) out[n++] = std::int32_t(chosen[j]);
    return n;
}

// Turns scores (plus a bias, if there is one) into weights before division by their sum; gives (largest score, sum), (-inf, 0) if every
// score is -inf.
template <class C>
inline void soften(C* row, const C* bias, int n, C& peak, C& total) {
    constexpr int W = LANES<C>;
    if (bias) at(row) += at(bias);
    vec<C> most = at(row);
    for (int j = W; j < n; j += W) {
        if (bias) at(row + j) += at(bias + j);
        most = at(row + j) > most ? at(row + j) : most;
    }
    peak = most[0];
    for (int l = 1; l < W; ++l) peak = std::max(peak, most[l]);
    total = 0;
    if (peak == -std::numeric_limits<C>::infinity()) { std::fill(row, row + n, C(0)); return; }
    vec<C> sum = {};
    for (int j = 0; j < n; j += W) {
        const vec<C> e = exponential(at(row + j) - peak);
        at(row + j) = e;
        sum += e;
    }
    total = horizontal_sum<C>(sum);
}

template <class T, class C>
inline void write_row(const C* y, C peak, C total, int d, T* out, C* lse) {
    const C inverse = total > 0 || total != total ? C(1) / total : C(0);
    for (int i = 0; i < d; ++i) store(out + i, y[i] * inverse);
    *lse = total == 0 ? -std::numeric_limits<C>::infinity() : peak + std::log(total);
}

// weights = exp(score - lse), dscore = weights * (dscore - <grad, out>)
template <class T, class C>
inline void differentiate(C* weight, C* dscore, int n, const C* grad, const T* out, int d, C lse) {
    constexpr int W = LANES<C>;
    C delta = 0;
    for (int i = 0; i < d; ++i) delta += grad[i] * C(load(out[i]));
    for (int j = 0; j < n; j += W) {
        const vec<C> e = exponential(at(weight + j) - lse);
        at(weight + j) = e;
        at(dscore + j) = e * (at(dscore + j) - delta);
    }
}

// Few queries a group and few keys in all: a dense pass under a mask is cheaper than gathering keys for every group.
inline bool dense_is_cheaper(const Shape& s) { return s.Lk <= 3 * i64(s.K) && s.Lk <= 1024 && s.Lq < 12 * i64(s.G); }

// 0 where a group may look, -inf elsewhere: (G, Lp)
template <class C>
int group_bias(const Shape& s, i64 bh, const i64* selected, const std::uint8_t* mask, C* bias, int Lp) {
    const i64* chosen = selected + bh * s.G * s.K;
    const std::uint8_t* m = mask ? mask + bh / s.H * s.Lk : nullptr;
    std::fill(bias, bias + i64(s.G) * Lp, -std::numeric_limits<C>::infinity());
    bool bad = false;
    for (int g = 0; g < s.G; ++g) {
        C* row = bias + i64(g) * Lp;
        for (int j = 0; j < s.K; ++j) {
            const i64 key = chosen[i64(g) * s.K + j];
            const bool outside = std::uint64_t(key) >= std::uint64_t(s.Lk);
            bad |= outside;
            row[outside ? 0 : key] = 0;
        }
        for (i64 key = 0; m && key < s.Lk; ++key)
            if (!m[key]) row[key] = -std::numeric_limits<C>::infinity();
    }
    return bad ? BAD_SELECTED : OK;
}

template <class T, class C>
int forward_dense(const T* q, const T* k, const T* v, const i64* assignment, const i64* selected, const std::uint8_t* mask, T* out, C* lse,
                  const Shape& s, const i64* qs, const i64* ks, const i64* vs, double scale, int threads) {
    const int L = int(s.Lk), Lp = padded<C>(L), dp = padded<C>(s.dv);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : failed)
    for (i64 bh = 0; bh < s.B * s.H; ++bh) {
        try {
            const i64 b = bh / s.H, h = bh % s.H;
            Workspace& w = workspace(bytes_of<C>({std::size_t(s.G) * Lp, std::size_t(s.d) * Lp, std::size_t(L) * dp, std::size_t(TILE) * s.d,
                                   std::size_t(TILE) * Lp, std::size_t(TILE) * dp}));
            C* bias = w.take<C>(std::size_t(s.G) * Lp);
            C* kt = w.take<C>(std::size_t(s.d) * Lp);
            C* vr = w.take<C>(std::size_t(L) * dp);
            C* x = w.take<C>(std::size_t(TILE) * s.d);
            C* score = w.take<C>(std::size_t(TILE) * Lp);
            C* y = w.take<C>(std::size_t(TILE) * dp);
            if (int bad = group_bias(s, bh, selected, mask, bias, Lp)) { failed = std::max(failed, bad); continue; }
            gather_transposed(k + b * ks[0] + h * ks[1], ks[2], static_cast<const std::int32_t*>(nullptr), L, s.d, kt, Lp);
            gather(v + b * vs[0] + h * vs[1], vs[2], static_cast<const std::int32_t*>(nullptr), L, s.dv, C(1), vr, dp);
            for (i64 t = 0; t < s.Lq; t += TILE) {
                const int m = int(std::min<i64>(TILE, s.Lq - t));
                const i64 first = bh * s.Lq + t;
                gather(q + b * qs[0] + h * qs[1] + t * qs[2], qs[2], static_cast<const std::int32_t*>(nullptr), m, s.d, C(scale), x, s.d);
                multiply<C, false>(x, s.d, 1, kt, Lp, score, Lp, m, Lp, s.d);
                C peak[TILE], total[TILE];
                for (int r = 0; r < m; ++r) {
                    const i64 g = assignment[first + r];
                    if (g < 0 || g >= s.G) { failed = std::max(failed, BAD_ASSIGNMENT); peak[r] = total[r] = 0; continue; }
                    soften(score + i64(r) * Lp, bias + g * Lp, Lp, peak[r], total[r]);
                }
                multiply<C, false>(score, Lp, 1, vr, dp, y, dp, m, dp, L);
                for (int r = 0; r < m; ++r)
                    write_row(y + i64(r) * dp, peak[r], total[r], s.dv, out + (first + r) * s.dv, lse + first + r);
            }
        } catch (const std::bad_alloc&) { failed = NO_MEMORY; }
    }
    return failed;
}

template <class T, class C>
int backward_dense(const T* g, const T* q, const T* k, const T* v, const i64* assignment, const i64* selected, const std::uint8_t* mask,
                   const T* out, const C* lse, T* dq, C* dk, C* dv, const Shape& s, const i64* gs, const i64* qs, const i64* ks, const i64* vs,
                   double scale, int threads) {
    constexpr int W = LANES<C>;
    const int L = int(s.Lk), Lp = padded<C>(L), dp = padded<C>(s.d), vp = padded<C>(s.dv);
    const std::int32_t* all = nullptr;
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : failed)
    for (i64 bh = 0; bh < s.B * s.H; ++bh) {
        try {
            const i64 b = bh / s.H, h = bh % s.H;
            Workspace& w = workspace(bytes_of<C>({std::size_t(s.G) * Lp, std::size_t(s.d) * Lp, std::size_t(s.dv) * Lp, std::size_t(L) * dp, std::size_t(L) * dp,
                                   std::size_t(L) * vp, std::size_t(TILE) * dp, std::size_t(TILE) * vp, std::size_t(TILE) * Lp,
                                   std::size_t(TILE) * Lp, std::size_t(TILE) * dp}));
            C* bias = w.take<C>(std::size_t(s.G) * Lp);
            C* kt = w.take<C>(std::size_t(s.d) * Lp);
            C* vt = w.take<C>(std::size_t(s.dv) * Lp);
            C* kr = w.take<C>(std::size_t(L) * dp);
            C* dkp = w.take<C>(std::size_t(L) * dp);
            C* dvp = w.take<C>(std::size_t(L) * vp);
            C* x = w.take<C>(std::size_t(TILE) * dp);
            C* y = w.take<C>(std::size_t(TILE) * vp);
            C* weight = w.take<C>(std::size_t(TILE) * Lp);
            C* dscore = w.take<C>(std::size_t(TILE) * Lp);
            C* dx = w.take<C>(std::size_t(TILE) * dp);
            if (int bad = group_bias(s, bh, selected, mask, bias, Lp)) { failed = std::max(failed, bad); continue; }
            const T* kh = k + b * ks[0] + h * ks[1];
            gather_transposed(kh, ks[2], all, L, s.d, kt, Lp);
            gather_transposed(v + b * vs[0] + h * vs[1], vs[2], all, L, s.dv, vt, Lp);
            gather(kh, ks[2], all, L, s.d, C(scale), kr, dp);
            std::fill(dkp, dkp + i64(L) * dp, C(0));
            std::fill(dvp, dvp + i64(L) * vp, C(0));
            for (i64 t = 0; t < s.Lq; t += TILE) {
                const int m = int(std::min<i64>(TILE, s.Lq - t));
                const i64 first = bh * s.Lq + t;
                gather(q + b * qs[0] + h * qs[1] + t * qs[2], qs[2], all, m, s.d, C(scale), x, dp);
                gather(g + b * gs[0] + h * gs[1] + t * gs[2], gs[2], all, m, s.dv, C(1), y, vp);
                multiply<C, false>(x, dp, 1, kt, Lp, weight, Lp, m, Lp, s.d);
                multiply<C, false>(y, vp, 1, vt, Lp, dscore, Lp, m, Lp, s.dv);
                for (int r = 0; r < m; ++r) {
                    const i64 group = assignment[first + r];
                    C *pr = weight + i64(r) * Lp, *ds = dscore + i64(r) * Lp;
                    const C norm = lse[first + r];
                    if (group < 0 || group >= s.G || norm == -std::numeric_limits<C>::infinity()) {
                        std::fill(pr, pr + Lp, C(0));
                        std::fill(ds, ds + Lp, C(0));
                        continue;
                    }
                    for (int j = 0; j < Lp; j += W) at(pr + j) += at(bias + group * Lp + j);
                    differentiate(pr, ds, Lp, y + i64(r) * vp, out + (first + r) * s.dv, s.dv, norm);
                }
                multiply<C, false>(dscore, Lp, 1, kr, dp, dx, dp, m, dp, L);
                multiply<C, true>(dscore, 1, Lp, x, dp, dkp, dp, L, dp, m);
                multiply<C, true>(weight, 1, Lp, y, vp, dvp, vp, L, vp, m);
                for (int r = 0; r < m; ++r)
                    for (int i = 0; i < s.d; ++i) store(dq + (first + r) * s.d + i, dx[i64(r) * dp + i]);
            }
            for (int j = 0; j < L; ++j) {
                for (int i = 0; i < s.d; ++i) dk[(bh * L + j) * s.d + i] = dkp[i64(j) * dp + i];
                for (int i = 0; i < s.dv; ++i) dv[(bh * L + j) * s.dv + i] = dvp[i64(j) * vp + i];
            }
        } catch (const std::bad_alloc&) { failed = NO_MEMORY; }
    }
    return failed;
}

template <class T, class C>
int forward(const T* q, const T* k, const T* v, const i64* assignment, const i64* selected, const std::uint8_t* mask, T* out, C* lse,
            const Shape& s, const i64* qs, const i64* ks, const i64* vs, double scale, int threads) {
    if (dense_is_cheaper(s)) return forward_dense<T, C>(q, k, v, assignment, selected, mask, out, lse, s, qs, ks, vs, scale, threads);
    std::vector<std::int32_t> order;
    std::vector<Piece> pieces;
    if (int bad = plan(s, assignment, selected, order, pieces, threads)) return bad;
    const int Kp = padded<C>(s.K), dp = padded<C>(s.dv);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
    for (i64 item = 0; item < i64(pieces.size()); ++item) {
        try {
            const Piece& p = pieces[std::size_t(item)];
            const i64 b = p.bh / s.H, h = p.bh % s.H;
            Workspace& w = workspace(bytes_of<C>({std::size_t(Kp), std::size_t(s.d) * Kp, std::size_t(s.K) * dp, std::size_t(TILE) * s.d, std::size_t(TILE) * Kp,
                                   std::size_t(TILE) * dp}));
            std::int32_t* index = w.take<std::int32_t>(Kp);
            C* kt = w.take<C>(std::size_t(s.d) * Kp);
            C* vr = w.take<C>(std::size_t(s.K) * dp);
            C* x = w.take<C>(std::size_t(TILE) * s.d);
            C* score = w.take<C>(std::size_t(TILE) * Kp);
            C* y = w.take<C>(std::size_t(TILE) * dp);
            const int n = gather_indices(s, selected, mask, p, index);
            const int np = padded<C>(n);
            gather_transposed(k + b * ks[0] + h * ks[1], ks[2], index, n, s.d, kt, np);
            gather(v + b * vs[0] + h * vs[1], vs[2], index, n, s.dv, C(1), vr, dp);
            const T* qh = q + b * qs[0] + h * qs[1];
            for (i64 t = p.from; t < p.to; t += TILE) {
                const std::int32_t* token = &order[std::size_t(p.bh * s.Lq + t)];
                const int m = int(std::min<i64>(TILE, p.to - t));
                if (n == 0) {
                    for (int r = 0; r < m; ++r) {
                        T* o = out + (p.bh * s.Lq + token[r]) * s.dv;
                        for (int i = 0; i < s.dv; ++i) store(o + i, C(0));
                        lse[p.bh * s.Lq + token[r]] = -std::numeric_limits<C>::infinity();
                    }
                    continue;
                }
                gather(qh, qs[2], token, m, s.d, C(scale), x, s.d);
                multiply<C, false>(x, s.d, 1, kt, np, score, np, m, np, s.d);
                C peak[TILE], total[TILE];
                for (int r = 0; r < m; ++r) {
                    C* row = score + i64(r) * np;
                    for (int j = n; j < np; ++j) row[j] = -std::numeric_limits<C>::infinity();
                    soften(row, static_cast<const C*>(nullptr), np, peak[r], total[r]);
                }
                multiply<C, false>(score, np, 1, vr, dp, y, dp, m, dp, n);
                for (int r = 0; r < m; ++r) {
                    const i64 place = p.bh * s.Lq + token[r];
                    write_row(y + i64(r) * dp, peak[r], total[r], s.dv, out + place * s.dv, lse + place);
                }
            }
        } catch (const std::bad_alloc&) { failed |= 1; }
    }
    return failed ? NO_MEMORY : OK;
}

// Recomputes the weights from the saved log-sum-exp. The gradients of keys and values are summed piece by piece, in the order of the pieces,
// without atomics: the same bits every time.
template <class T, class C>
int backward(const T* g, const T* q, const T* k, const T* v, const i64* assignment, const i64* selected, const std::uint8_t* mask, const T* out,
             const C* lse, T* dq, C* dk, C* dv, const Shape& s, const i64* gs, const i64* qs, const i64* ks, const i64* vs, double scale,
             int threads) {
    if (dense_is_cheaper(s))
        return backward_dense<T, C>(g, q, k, v, assignment, selected, mask, out, lse, dq, dk, dv, s, gs, qs, ks, vs, scale, threads);
    std::vector<std::int32_t> order;
    std::vector<Piece> pieces;
    if (int bad = plan(s, assignment, selected, order, pieces, threads)) return bad;
    const int Kp = padded<C>(s.K), dp = padded<C>(s.d), vp = padded<C>(s.dv);

    // The gradients of one piece: dq goes to its place, those of the group's keys and values to dkp (n, dp) and dvp (n, vp); returns n.
    auto differentiate_piece = [&](const Piece& p, std::int32_t* index, C* dkp, C* dvp, Workspace& w) -> int {
        const i64 b = p.bh / s.H, h = p.bh % s.H;
        C* kt = w.take<C>(std::size_t(s.d) * Kp);
        C* vt = w.take<C>(std::size_t(s.dv) * Kp);
        C* kr = w.take<C>(std::size_t(s.K) * dp);
        C* x = w.take<C>(std::size_t(TILE) * dp);
        C* y = w.take<C>(std::size_t(TILE) * vp);
        C* weight = w.take<C>(std::size_t(TILE) * Kp);
        C* dscore = w.take<C>(std::size_t(TILE) * Kp);
        C* dx = w.take<C>(std::size_t(TILE) * dp);
        const int n = gather_indices(s, selected, mask, p, index);
        const int np = padded<C>(n);
        const T* kh = k + b * ks[0] + h * ks[1];
        gather_transposed(kh, ks[2], index, n, s.d, kt, np);
        gather_transposed(v + b * vs[0] + h * vs[1], vs[2], index, n, s.dv, vt, np);
        gather(kh, ks[2], index, n, s.d, C(scale), kr, dp);
        std::fill(dkp, dkp + i64(n) * dp, C(0));
        std::fill(dvp, dvp + i64(n) * vp, C(0));
        for (i64 t = p.from; t < p.to; t += TILE) {
            const std::int32_t* token = &order[std::size_t(p.bh * s.Lq + t)];
            const int m = int(std::min<i64>(TILE, p.to - t));
            if (n == 0) {
                for (int r = 0; r < m; ++r)
                    for (int i = 0; i < s.d; ++i) store(dq + (p.bh * s.Lq + token[r]) * s.d + i, C(0));
                continue;
            }
            gather(q + b * qs[0] + h * qs[1], qs[2], token, m, s.d, C(scale), x, dp);
            gather(g + b * gs[0] + h * gs[1], gs[2], token, m, s.dv, C(1), y, vp);
            multiply<C, false>(x, dp, 1, kt, np, weight, np, m, np, s.d);
            multiply<C, false>(y, vp, 1, vt, np, dscore, np, m, np, s.dv);
            for (int r = 0; r < m; ++r) {
                const i64 place = p.bh * s.Lq + token[r];
                differentiate(weight + i64(r) * np, dscore + i64(r) * np, np, y + i64(r) * vp, out + place * s.dv, s.dv, lse[place]);
            }
            multiply<C, false>(dscore, np, 1, kr, dp, dx, dp, m, dp, n);
            multiply<C, true>(dscore, 1, np, x, dp, dkp, dp, n, dp, m);
            multiply<C, true>(weight, 1, np, y, vp, dvp, vp, n, vp, m);
            for (int r = 0; r < m; ++r)
                for (int i = 0; i < s.d; ++i) store(dq + (p.bh * s.Lq + token[r]) * s.d + i, dx[i64(r) * dp + i]);
        }
        return n;
    };
    const std::size_t scratch = bytes_of<C>({std::size_t(Kp), std::size_t(s.K) * dp, std::size_t(s.K) * vp, std::size_t(s.d) * Kp,
                                             std::size_t(s.dv) * Kp, std::size_t(s.K) * dp, std::size_t(TILE) * dp, std::size_t(TILE) * vp,
                                             std::size_t(TILE) * Kp, std::size_t(TILE) * Kp, std::size_t(TILE) * dp});
    auto add_rows = [&](i64 bh, const std::int32_t* index, int n, const C* dkp, const C* dvp, i64 low, i64 high) {
        for (int j = 0; j < n; ++j) {
            if (index[j] < low || index[j] >= high) continue;
            C *to_k = dk + (bh * s.Lk + index[j]) * s.d, *to_v = dv + (bh * s.Lk + index[j]) * s.dv;
            for (int i = 0; i < s.d; ++i) to_k[i] += dkp[i64(j) * dp + i];
            for (int i = 0; i < s.dv; ++i) to_v[i] += dvp[i64(j) * vp + i];
        }
    };
    auto first_piece = [&](i64 bh) {
        return std::lower_bound(pieces.begin(), pieces.end(), bh, [](const Piece& p, i64 x) { return p.bh < x; });
    };
    int failed = 0;

    if (s.B * s.H >= 2 * threads) {  // enough heads for all threads: each owns whole heads and adds in place
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
        for (i64 bh = 0; bh < s.B * s.H; ++bh) {
            try {
                for (auto p = first_piece(bh); p != pieces.end() && p->bh == bh; ++p) {
                    Workspace& w = workspace(scratch);
                    std::int32_t* index = w.take<std::int32_t>(Kp);
                    C* dkp = w.take<C>(std::size_t(s.K) * dp);
                    C* dvp = w.take<C>(std::size_t(s.K) * vp);
                    const int n = differentiate_piece(*p, index, dkp, dvp, w);
                    add_rows(bh, index, n, dkp, dvp, 0, s.Lk);
                }
            } catch (const std::bad_alloc&) { failed |= 1; }
        }
        return failed ? NO_MEMORY : OK;
    }

    // Few heads: threads share them. Every piece keeps its sums, and a second pass adds them up, each thread owning a range of keys.
    std::unique_ptr<C[]> partial(new (std::nothrow) C[std::max<std::size_t>(1, pieces.size() * s.K * (dp + vp))]);
    if (!partial) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
    for (i64 item = 0; item < i64(pieces.size()); ++item) {
        try {
            Workspace& w = workspace(scratch);
            C* dkp = &partial[std::size_t(item) * s.K * (dp + vp)];
            differentiate_piece(pieces[std::size_t(item)], w.take<std::int32_t>(Kp), dkp, dkp + i64(s.K) * dp, w);
        } catch (const std::bad_alloc&) { failed |= 1; }
    }
    if (failed) return NO_MEMORY;

    const i64 slices = std::max<i64>(1, std::min<i64>(s.Lk, (threads + s.B * s.H - 1) / (s.B * s.H)));
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
    for (i64 job = 0; job < s.B * s.H * slices; ++job) {
        try {
            const i64 bh = job / slices, low = s.Lk * (job % slices) / slices, high = s.Lk * (job % slices + 1) / slices;
            Workspace& w = workspace(scratch);
            std::int32_t* index = w.take<std::int32_t>(Kp);
            for (auto p = first_piece(bh); p != pieces.end() && p->bh == bh; ++p) {
                const C* dkp = &partial[std::size_t(p - pieces.begin()) * s.K * (dp + vp)];
                add_rows(bh, index, gather_indices(s, selected, mask, *p, index), dkp, dkp + i64(s.K) * dp, low, high);
            }
        } catch (const std::bad_alloc&) { failed |= 1; }
    }
    return failed ? NO_MEMORY : OK;
}

template <class F> int guarded(F f) {
    try {
        return f();
    } catch (const std::bad_alloc&) { return NO_MEMORY; }
}

}  // namespace

// sizes: B, H, Lq, Lk, d, dv, G, K. strides: 3 numbers for each of query, key, value, grad (those not used are zero).
#define EXPORT(SUFFIX, T, C)                                                                                                                      \
    extern "C" int coterie_groups_##SUFFIX(const T* q, const T* k, const float* closeness, const float* bias, const float* direction,              \
                                           const std::uint8_t* mask, i64* assignment, i64* selected, const i64* n, const i64* st, int unit_keys,  \
                                           int threads) {                                                                                         \
        return guarded([&] {                                                                                                                      \
            return dynamic_groups<T>(q, k, closeness, bias, direction, mask, assignment, selected, n[0], n[1], n[2], n[3], int(n[4]), int(n[6]),   \
                                     int(n[7]), st, st + 3, unit_keys, threads);                                                                  \
        });                                                                                                                                       \
    }                                                                                                                                             \
    extern "C" int coterie_forward_##SUFFIX(const T* q, const T* k, const T* v, const i64* assignment, const i64* selected,                        \
                                            const std::uint8_t* mask, T* out, C* lse, const i64* n, const i64* st, double scale, int threads) {    \
        const Shape s{n[0], n[1], n[2], n[3], int(n[4]), int(n[5]), int(n[6]), int(n[7])};                                                        \
        return guarded([&] { return forward<T, C>(q, k, v, assignment, selected, mask, out, lse, s, st, st + 3, st + 6, scale, threads); });      \
    }                                                                                                                                             \
    extern "C" int coterie_backward_##SUFFIX(const T* g, const T* q, const T* k, const T* v, const i64* assignment, const i64* selected,           \
                                             const std::uint8_t* mask, const T* out, const C* lse, T* dq, C* dk, C* dv, const i64* n,             \
                                             const i64* st, double scale, int threads) {                                                          \
        const Shape s{n[0], n[1], n[2], n[3], int(n[4]), int(n[5]), int(n[6]), int(n[7])};                                                        \
        return guarded([&] {                                                                                                                      \
            return backward<T, C>(g, q, k, v, assignment, selected, mask, out, lse, dq, dk, dv, s, st + 9, st, st + 3, st + 6, scale, threads);    \
        });                                                                                                                                       \
    }

EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, bf16, float)
