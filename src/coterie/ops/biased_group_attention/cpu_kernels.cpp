// Attention inside disjoint groups of tokens, with a bias: queries, keys and values are read where they lie, packed rows of
// [3, heads, head_dim] per token, and output and gradients are written the same way. One group of one image at a time.
//
//   forward   S = scale Q K^T + bias, P = softmax(S), O = P V
//   backward  P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - <dO, O>), dQ = scale dS K, dK = scale dS^T Q, dbias += dS

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "_matrix.h"

namespace {

constexpr int OK = 0, OUTSIDE = 1, NO_MEMORY = 2;

struct Shape {
    i64 B, N, H, D, G, T;  // images, tokens, heads, head_dim, groups, places in a group
};

// The tokens of a group, as queries and as keys: which they are, and which places they have.
struct Members {
    std::vector<i64> query, key;
    std::vector<int> query_place, key_place;
    void gather(const Shape& s, const i64* group, const std::uint8_t* mask) {
        query.clear(), key.clear(), query_place.clear(), key_place.clear();
        for (i64 t = 0; t < s.T; ++t) {
            if (group[t] < 0) continue;
            query.push_back(group[t]), query_place.push_back(int(t));
            if (!mask || mask[group[t]]) key.push_back(group[t]), key_place.push_back(int(t));
        }
    }
};

// Every token is in one group at most; those in none are counted.
int check(const Shape& s, const i64* groups, std::vector<std::uint8_t>& seen) {
    seen.assign(std::size_t(s.N), 0);
    for (i64 i = 0; i < s.G * s.T; ++i) {
        if (groups[i] < 0) continue;
        if (groups[i] >= s.N || seen[std::size_t(groups[i])]) return OUTSIDE;
        seen[std::size_t(groups[i])] = 1;
    }
    return OK;
}

template <class C> void zero_the_others(const Shape& s, const std::vector<std::uint8_t>& seen, C* y, i64 row) {
    for (i64 n = 0; n < s.N; ++n)
        if (!seen[std::size_t(n)])
            for (i64 b = 0; b < s.B; ++b) std::fill_n(y + (b * s.N + n) * row, row, C(0));
}

// The bias of all heads with rows of whole vectors, minus infinity behind the last place; one head of zeros if there is none.
template <class C> struct Bias {
    std::vector<C> values;
    i64 head;
    int ld;
    Bias(const Shape& s, const C* bias) : head(bias ? s.T * padded<C>(s.T) : 0), ld(padded<C>(s.T)) {
        values.assign(std::size_t((bias ? s.H : 1) * s.T * ld), -std::numeric_limits<C>::infinity());
        for (i64 row = 0; row < (bias ? s.H : 1) * s.T; ++row)
            for (i64 t = 0; t < s.T; ++t) values[std::size_t(row * ld + t)] = bias ? bias[row * s.T + t] : C(0);
    }
    // That of a group, which has `ldg` columns: a look into it if all places are taken, else gathered into `own`.
    const C* of(const Shape& s, const Members& m, i64 h, int ldg, C* own) const {
        const C* all = values.data() + h * head;
        const std::size_t nq = m.query.size(), nk = m.key.size();
        if (nq == std::size_t(s.T) && nk == nq) return all;
        for (std::size_t i = 0; i < nq; ++i) {
            for (std::size_t j = 0; j < nk; ++j) own[i * ldg + j] = all[m.query_place[i] * ld + m.key_place[j]];
            std::fill(own + i * ldg + nk, own + (i + 1) * ldg, -std::numeric_limits<C>::infinity());
        }
        return own;
    }
};

template <class C> void pack_rows(const C* base, i64 row, const std::vector<i64>& tokens, i64 D, int ld, C scale, C* out) {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        const C* x = base + tokens[i] * row;
        C* y = out + i * ld;
        for (i64 d = 0; d < D; ++d) y[d] = scale * x[d];
        std::fill(y + D, y + ld, C(0));
    }
}

// Transposed: [D, ld], zeros behind the last token. A block of rows at a time, so that stores go side by side.
template <class C> void pack_columns(const C* base, i64 row, const std::vector<i64>& tokens, i64 D, int ld, C* out) {
    constexpr int W = LANES<C>;
    const int n = int(tokens.size());
    for (int j = 0; j < ld; j += W) {
        const C* x[W];
        const int many = std::min(W, n - j);
        for (int l = 0; l < W; ++l) x[l] = l < many ? base + tokens[std::size_t(j + l)] * row : nullptr;
        if (many == W) {
            for (i64 d = 0; d < D; ++d)
                for (int l = 0; l < W; ++l) out[d * ld + j + l] = x[l][d];
        } else {
            for (i64 d = 0; d < D; ++d)
                for (int l = 0; l < W; ++l) out[d * ld + j + l] = l < many ? x[l][d] : C(0);
        }
    }
}

template <class C>
int forward(const C* qkv, const i64* groups, const C* bias, const std::uint8_t* mask, C* y, C* lse, const Shape& s, C scale, int threads) {
    constexpr int W = LANES<C>;
    std::vector<std::uint8_t> seen;
    if (int error = check(s, groups, seen)) return error;
    zero_the_others(s, seen, y, s.H * s.D);
    const Bias<C> biases(s, bias);
    const int Tp = padded<C>(s.T), Dp = padded<C>(s.D);
    const std::size_t T = std::size_t(s.T);
    const i64 row = 3 * s.H * s.D;
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : failed)
    for (int part = 0; part < threads; ++part) try {
        Workspace& w = workspace(bytes_of<C>({T * Dp, T * Dp, std::size_t(s.D) * Tp, T * Tp, T * Tp, T * Dp, T}));
        C *Q = w.take<C>(T * Dp), *V = w.take<C>(T * Dp), *Kt = w.take<C>(std::size_t(s.D) * Tp), *S = w.take<C>(T * Tp);
        C *own = w.take<C>(T * Tp), *O = w.take<C>(T * Dp), *inverse = w.take<C>(T);
        Members m;
        for (i64 job = s.B * s.G * part / threads; job < s.B * s.G * (part + 1) / threads; ++job) {
            const i64 b = job / s.G;
            m.gather(s, groups + job % s.G * s.T, mask ? mask + b * s.N : nullptr);
            const int nq = int(m.query.size()), nk = int(m.key.size()), ld = padded<C>(nk);
            for (i64 h = 0; h < s.H; ++h) {
                const C* base = qkv + b * s.N * row + h * s.D;
                C* out = y + (b * s.N * s.H + h) * s.D;
                C* sums = lse + (b * s.H + h) * s.N;
                if (nk == 0) {
                    for (i64 token : m.query) std::fill_n(out + token * s.H * s.D, s.D, C(0)), sums[token] = C(0);
                    continue;
                }
                pack_rows(base, row, m.query, s.D, Dp, scale, Q);
                pack_columns(base + s.H * s.D, row, m.key, s.D, ld, Kt);
                pack_rows(base + 2 * s.H * s.D, row, m.key, s.D, Dp, C(1), V);
                multiply<C, false>(Q, Dp, 1, Kt, ld, S, ld, nq, ld, int(s.D));
                const C* add = biases.of(s, m, h, ld, own);
                for (int i = 0; i < nq; ++i) {
                    C* p = S + i64(i) * ld;
                    const C* a = add + i64(i) * ld;
                    vec<C> most = at(p) + at(a);
                    for (int j = 0; j < ld; j += W) {
                        const vec<C> x = at(p + j) + at(a + j);
                        at(p + j) = x;
                        most = x > most ? x : most;
                    }
                    const C top = horizontal_max<C>(most);
                    vec<C> sum{};
                    for (int j = 0; j < ld; j += W) {
                        const vec<C> e = exponential(at(p + j) - top);
                        at(p + j) = e;
                        sum += e;
                    }
                    const C total = horizontal_sum<C>(sum);
                    sums[m.query[std::size_t(i)]] = top + std::log(total);
                    inverse[i] = C(1) / total;
                }
                multiply<C, false>(S, ld, 1, V, Dp, O, Dp, nq, Dp, nk);
                for (int i = 0; i < nq; ++i) {
                    C* to = out + m.query[std::size_t(i)] * s.H * s.D;
                    for (i64 d = 0; d < s.D; ++d) to[d] = inverse[i] * O[i64(i) * Dp + d];
                }
            }
        }
    } catch (const std::bad_alloc&) { failed |= 1; }
    return failed ? NO_MEMORY : OK;
}

template <class C>
int backward(const C* g, const C* qkv, const i64* groups, const C* bias, const std::uint8_t* mask, const C* y, const C* lse, C* dqkv, C* dbias,
             const Shape& s, C scale, int threads) {
    constexpr int W = LANES<C>;
    std::vector<std::uint8_t> seen;
    if (int error = check(s, groups, seen)) return error;
    const i64 row = 3 * s.H * s.D, out_row = s.H * s.D;
    zero_the_others(s, seen, dqkv, row);
    const Bias<C> biases(s, bias);
    const int Tp = padded<C>(s.T), Dp = padded<C>(s.D);
    const std::size_t T = std::size_t(s.T), table = std::size_t(s.H) * T * Tp;
    std::vector<std::vector<C>> partial(dbias ? std::size_t(threads) : 0);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : failed)
    for (int part = 0; part < threads; ++part) try {  // as many parts as threads, so that sums come out the same
            const std::size_t TD = T * Dp, DT = std::size_t(s.D) * Tp, TT = T * Tp;
            Workspace& w = workspace(bytes_of<C>({TD, TD, TD, TD, DT, DT, TT, TT, TT}));
            C *Q = w.take<C>(TD), *K = w.take<C>(TD), *dO = w.take<C>(TD), *product = w.take<C>(TD);
            C *Kt = w.take<C>(DT), *Vt = w.take<C>(DT), *P = w.take<C>(TT), *dP = w.take<C>(TT), *own = w.take<C>(TT);
            if (dbias) partial[std::size_t(part)].assign(table, C(0));
            Members m;
            for (i64 job = s.B * s.G * part / threads; job < s.B * s.G * (part + 1) / threads; ++job) {
                const i64 b = job / s.G;
                m.gather(s, groups + job % s.G * s.T, mask ? mask + b * s.N : nullptr);
                const int nq = int(m.query.size()), nk = int(m.key.size()), ld = padded<C>(nk);
                const bool whole = nq == s.T && nk == s.T;
                for (i64 h = 0; h < s.H; ++h) {
                    const C* base = qkv + b * s.N * row + h * s.D;
                    C* to = dqkv + b * s.N * row + h * s.D;
                    if (nk < nq)
                        for (i64 token : m.query)
                            for (int part3 = 0; part3 < 3; ++part3) std::fill_n(to + token * row + part3 * out_row, s.D, C(0));
                    if (nk == 0) continue;
                    const C *g_base = g + (b * s.N * s.H + h) * s.D, *y_base = y + (b * s.N * s.H + h) * s.D;
                    const C* sums = lse + (b * s.H + h) * s.N;
                    pack_rows(base, row, m.query, s.D, Dp, scale, Q);
                    pack_rows(base + out_row, row, m.key, s.D, Dp, C(1), K);
                    pack_rows(g_base, out_row, m.query, s.D, Dp, C(1), dO);
                    pack_columns(base + out_row, row, m.key, s.D, ld, Kt);
                    pack_columns(base + 2 * out_row, row, m.key, s.D, ld, Vt);
                    multiply<C, false>(Q, Dp, 1, Kt, ld, P, ld, nq, ld, int(s.D));
                    multiply<C, false>(dO, Dp, 1, Vt, ld, dP, ld, nq, ld, int(s.D));
                    const C* add = biases.of(s, m, h, ld, own);
                    for (int i = 0; i < nq; ++i) {
                        const i64 token = m.query[std::size_t(i)];
                        const C* o = y_base + token * out_row;
                        C delta = 0;
                        for (i64 d = 0; d < s.D; ++d) delta += dO[i64(i) * Dp + d] * o[d];
                        C *p = P + i64(i) * ld, *dp = dP + i64(i) * ld;
                        const C *a = add + i64(i) * ld, sum = sums[token];
                        for (int j = 0; j < ld; j += W) {
                            const vec<C> e = exponential(at(p + j) + at(a + j) - sum);
                            at(p + j) = e;
                            at(dp + j) = e * (at(dp + j) - delta);
                        }
                    }
                    if (dbias) {
                        C* sum = partial[std::size_t(part)].data() + h * s.T * Tp;
                        if (whole) {
                            for (i64 i = 0; i < s.T * Tp; i += W) at(sum + i) += at(dP + i);
                        } else {
                            for (int i = 0; i < nq; ++i)
                                for (int j = 0; j < nk; ++j)
                                    sum[m.query_place[std::size_t(i)] * Tp + m.key_place[std::size_t(j)]] += dP[i64(i) * ld + j];
                        }
                    }
                    const auto put = [&](const std::vector<i64>& tokens, i64 offset, C factor) {
                        for (std::size_t i = 0; i < tokens.size(); ++i)
                            for (i64 d = 0; d < s.D; ++d) to[tokens[i] * row + offset + d] = factor * product[i * Dp + d];
                    };
                    multiply<C, false>(dP, ld, 1, K, Dp, product, Dp, nq, Dp, nk);
                    put(m.query, 0, scale);
                    multiply<C, false>(dP, 1, ld, Q, Dp, product, Dp, nk, Dp, nq);
                    put(m.key, out_row, C(1));
                    multiply<C, false>(P, 1, ld, dO, Dp, product, Dp, nk, Dp, nq);
                    put(m.key, 2 * out_row, C(1));
                }
            }
        } catch (const std::bad_alloc&) { failed |= 1; }
    if (failed) return NO_MEMORY;
    if (dbias)
        for (i64 r = 0; r < s.H * s.T; ++r)
            for (i64 t = 0; t < s.T; ++t) {
                C sum = 0;
                for (const auto& p : partial) sum += p[std::size_t(r * Tp + t)];
                dbias[r * s.T + t] = sum;
            }
    return OK;
}

template <class F> int guarded(F f) {
    try {
        return f();
    } catch (const std::bad_alloc&) { return NO_MEMORY; }
}

}  // namespace

// sizes: B, N, H, D, G, T.
#define EXPORT(SUFFIX, C)                                                                                                                        \
    extern "C" int coterie_forward_##SUFFIX(const C* qkv, const i64* groups, const C* bias, const std::uint8_t* mask, C* y, C* lse,               \
                                            const i64* n, double scale, int threads) {                                                           \
        const Shape s{n[0], n[1], n[2], n[3], n[4], n[5]};                                                                                       \
        return guarded([&] { return forward<C>(qkv, groups, bias, mask, y, lse, s, C(scale), threads); });                                       \
    }                                                                                                                                            \
    extern "C" int coterie_backward_##SUFFIX(const C* g, const C* qkv, const i64* groups, const C* bias, const std::uint8_t* mask, const C* y,    \
                                             const C* lse, C* dqkv, C* dbias, const i64* n, double scale, int threads) {                         \
        const Shape s{n[0], n[1], n[2], n[3], n[4], n[5]};                                                                                       \
        return guarded([&] { return backward<C>(g, qkv, groups, bias, mask, y, lse, dqkv, dbias, s, C(scale), threads); });                      \
    }

EXPORT(float32, float)
EXPORT(float64, double)
