// Who belongs where: the nearest centroid of every query, and the best keys of every group.
#pragma once

#include <limits>
#include <memory>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "gather.h"

namespace {

constexpr std::int32_t NEVER = std::numeric_limits<std::int32_t>::min();

// Floats as integers of the same order, in place; -0 equals 0, and what may never be chosen before anything else (NaN) is NEVER.
inline void to_ordered(float* x, int n) {
    for (int i = 0; i < n; i += LANES<float>) {
        const vfloat f = at(x + i) + 0.0f;
        const vint bits = reinterpret_cast<const vint&>(f);
        const vint value = bits ^ ((bits >> 31) & 0x7fffffff);
        const vint number = f == f;
        const vint result = (value & number) | (~number & NEVER);
        std::memcpy(x + i, &result, VECTOR_BYTES);
    }
}

inline std::int32_t ordered(float x) {
    std::int32_t bits;
    x += 0.0f;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float from_ordered(std::int32_t x) {
    const std::int32_t bits = x ^ ((x >> 31) & 0x7fffffff);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Puts those of eight integers that reach `bar` side by side, with their indices; gives their number. Writes eight of each.
#ifdef __AVX2__
struct Lanes {
    std::uint64_t of[256];  // for a mask of eight bits, the lanes that are set, a byte each
    Lanes() {
        for (int mask = 0; mask < 256; ++mask) {
            of[mask] = 0;
            for (int l = 7; l >= 0; --l)
                if (mask >> l & 1) of[mask] = of[mask] << 8 | std::uint64_t(l);
        }
    }
};
const Lanes LANES_SET;
inline int keep(const std::int32_t* value, const std::int32_t* which, std::int32_t bar, std::int32_t* score, std::int32_t* index) {
    const auto load8 = [](const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
    const auto store8 = [](std::int32_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); };
    const __m256i v = load8(value), w = load8(which);
    const int mask = ~_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(bar), v))) & 255;
    if (!mask) return 0;
    const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)LANES_SET.of[mask]));
    store8(score, _mm256_permutevar8x32_epi32(v, order));
    store8(index, _mm256_permutevar8x32_epi32(w, order));
    return __builtin_popcount(unsigned(mask));
}
#else
inline int keep(const std::int32_t* value, const std::int32_t* which, std::int32_t bar, std::int32_t* score, std::int32_t* index) {
    int n = 0;
    for (int l = 0; l < 8; ++l) {
        const std::int32_t v = value[l], w = which[l];
        score[n] = v;
        index[n] = w;
        n += v >= bar;
    }
    return n;
}
#endif

// The best `k` of candidates that come in order of rising index: higher scores first, then lower indices. Held in order of index, with
// room for eight more than there are.
struct TopK {
    std::int32_t *score, *index;
    int n;

    // Takes those of further candidates that reach `bar`.
    void add(const std::int32_t* value, const std::int32_t* which, int count, std::int32_t bar) {
        int kept = n, j = 0;
        for (; j + 8 <= count; j += 8) kept += keep(value + j, which + j, bar, score + kept, index + kept);
        for (; j < count; ++j) {
            score[kept] = value[j];
            index[kept] = which[j];
            kept += value[j] >= bar;
        }
        n = kept;
    }

    // Keeps the best k (all, if there are no more); returns the least score with which a further candidate gets in.
    std::int32_t shrink(int k) {
        const int count = n;
        std::int32_t *const s = score, *const at = index;
        if (count < k) return NEVER;
        std::int32_t low = s[0], high = s[0];
        for (int j = 1; j < count; ++j) {
            low = std::min(low, s[j]);
            high = std::max(high, s[j]);
        }
        if (count == k) return low + 1;
        // The k-th largest score lies in [low, high]; `reach` scores reach `low`, `above` lie beyond `high`. A few guesses, as if scores lay
        // evenly between the two, mostly find a score that exactly k reach; bisection of the bits ends whatever is left.
        int reach = count, above = 0;
        for (int guess = 0; low < high && reach != k; ++guess) {
            std::int32_t middle = std::int32_t((i64(low) + high + 1) >> 1);
            if (guess < 8) {
                const float from = from_ordered(low), to = from_ordered(high);
                const float share = std::min(std::max(float(reach - k) / float(reach - above), 0.1f), 0.9f);
                const float value = from + (to - from) * share;
                if (std::isfinite(value)) middle = std::min(std::max(ordered(value), low + 1), high);
            }
            int reaching = 0;
            for (int j = 0; j < count; ++j) reaching += s[j] >= middle;
            if (reaching >= k) {
                low = middle;
                reach = reaching;
            } else {
                high = middle - 1;
                above = reaching;
            }
        }
        int kept = 0, j = 0;
        if (reach == k) {
            for (; j + 8 <= count; j += 8) kept += keep(s + j, at + j, low, s + kept, at + kept);
            for (; j < count; ++j) {
                s[kept] = s[j];
                at[kept] = at[j];
                kept += s[kept] >= low;
            }
        } else {  // several equal the k-th largest: the first of them stay
            int equal = k;
            for (j = 0; j < count; ++j) equal -= s[j] > low;
            for (j = 0; j < count; ++j) {
                const std::int32_t value = s[j];
                const bool tie = value == low && equal > 0;
                equal -= tie;
                s[kept] = value;
                at[kept] = at[j];
                kept += value > low || tie;
            }
        }
        n = kept;
        return low + 1;  // no overflow: the largest score, that of infinity, is below the largest integer
    }
};

// Columns of x (d, ld) brought to length 1.
inline void unit_columns(float* x, int d, int ld) {
    for (int j = 0; j < ld; ++j) {
        float square = 0;
        for (int i = 0; i < d; ++i) square += x[i64(i) * ld + j] * x[i64(i) * ld + j];
        const float inverse = 1.0f / std::max(std::sqrt(square), std::numeric_limits<float>::min());
        for (int i = 0; i < d; ++i) x[i64(i) * ld + j] *= inverse;
    }
}

template <class T>
int dynamic_groups(const T* q, const T* k, const float* closeness, const float* bias, const float* direction, const std::uint8_t* mask,
                   i64* assignment, i64* selected, i64 B, i64 H, i64 Lq, i64 Lk, int d, int G, int top_k, const i64* qs, const i64* ks,
                   int unit_keys, int threads) {
    constexpr int W = LANES<float>, TOKENS = 512;
    const i64 QP = 2048, KP = 8192;  // queries, keys per piece of work
    const i64 qpieces = (Lq + QP - 1) / QP, kpieces = (Lk + KP - 1) / KP;
    int failed = 0;

#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 item = 0; item < B * H * qpieces; ++item) {
        const i64 b = item / qpieces / H, h = item / qpieces % H, from = item % qpieces * QP, to = std::min(Lq, from + QP);
        const int Tp = padded<float>(std::min<i64>(TOKENS, to - from));
        Workspace& w = workspace(bytes_of<float>({std::size_t(d) * Tp, std::size_t(G) * Tp}));
        float* qt = w.take<float>(std::size_t(d) * Tp);
        float* score = w.take<float>(std::size_t(G) * Tp);
        const float* offset = bias + h * G;
        for (i64 t = from; t < to; t += TOKENS) {
            const int n = int(std::min<i64>(TOKENS, to - t)), np = padded<float>(n);
            gather_transposed(q + b * qs[0] + h * qs[1] + t * qs[2], qs[2], static_cast<const std::int32_t*>(nullptr), n, d, qt, np);
            multiply<float, false>(closeness + h * G * d, d, 1, qt, np, score, np, G, np, d);
            for (int j = 0; j < np; j += W) {
                vfloat best = at(score + j) + offset[0];
                vint which = {};
                for (int g = 1; g < G; ++g) {
                    const vfloat s = at(score + i64(g) * np + j) + offset[g];
                    const vint more = s > best;
                    best = more ? s : best;
                    which = more ? vint{} + g : which;
                }
                for (int l = 0; l < W && j + l < n; ++l) assignment[(b * H + h) * Lq + t + j + l] = which[l];
            }
        }
    }

    // Every piece of the keys chooses its own best; where there are several pieces, the best of those follow.
    std::unique_ptr<std::int32_t[]> found;
    if (kpieces > 1 && !(found = std::unique_ptr<std::int32_t[]>(new (std::nothrow) std::int32_t[std::size_t(B * H * kpieces * G) * top_k * 2])))
        return NO_MEMORY;
    std::vector<std::int32_t> counts(std::size_t(kpieces > 1 ? B * H * kpieces * G : 0));
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
    for (i64 item = 0; item < B * H * kpieces; ++item) {
        try {
            const i64 b = item / kpieces / H, h = item / kpieces % H, from = item % kpieces * KP, to = std::min(Lk, from + KP);
            const int room = int(std::min<i64>(to - from, std::max(2 * top_k, TOKENS) + TOKENS)) + 8;  // candidates of a group
            const int Tp = padded<float>(std::min<i64>(TOKENS, to - from));
            Workspace& w = workspace(bytes_of<float>({std::size_t(d) * Tp, std::size_t(G) * Tp, std::size_t(G), std::size_t(G) * room, std::size_t(G) * room,
                                       std::size_t(G) * (sizeof(TopK) / 4 + 1)}));
            float* kt = w.take<float>(std::size_t(d) * Tp);
            float* score = w.take<float>(std::size_t(G) * Tp);
            std::int32_t* bar = w.take<std::int32_t>(std::size_t(G));
            std::int32_t* scores = w.take<std::int32_t>(std::size_t(G) * room);
            std::int32_t* indices = w.take<std::int32_t>(std::size_t(G) * room);
            TopK* top = w.take<TopK>(std::size_t(G));
            for (int g = 0; g < G; ++g) {
                top[g] = TopK{scores + i64(g) * room, indices + i64(g) * room, 0};
                bar[g] = NEVER;
            }
            for (i64 t = from; t < to; t += TOKENS) {
                const int n = int(std::min<i64>(TOKENS, to - t)), np = padded<float>(n);
                gather_transposed(k + b * ks[0] + h * ks[1] + t * ks[2], ks[2], static_cast<const std::int32_t*>(nullptr), n, d, kt, np);
                if (unit_keys) unit_columns(kt, d, np);
                multiply<float, false>(direction + h * G * d, d, 1, kt, np, score, np, G, np, d);
                to_ordered(score, G * np);
                std::int32_t* value = reinterpret_cast<std::int32_t*>(score);
                std::int32_t place[TOKENS];
                for (int j = 0; j < n; ++j) place[j] = std::int32_t(t + j);
                for (int j = 0; mask && j < n; ++j)
                    for (int g = 0; !mask[b * Lk + t + j] && g < G; ++g) value[g * np + j] = NEVER;
                for (int g = 0; g < G; ++g) {
                    top[g].add(value + g * np, place, n, bar[g]);
                    if (top[g].n > room - 8 - TOKENS) bar[g] = top[g].shrink(top_k);
                }
            }
            for (int g = 0; g < G; ++g) {
                top[g].shrink(top_k);
                if (kpieces == 1) {
                    for (int j = 0; j < top_k; ++j) selected[(item * G + g) * top_k + j] = top[g].index[j];
                } else {
                    const std::size_t place = std::size_t(item * G + g);
                    counts[place] = top[g].n;
                    std::copy(top[g].score, top[g].score + top[g].n, &found[place * top_k * 2]);
                    std::copy(top[g].index, top[g].index + top[g].n, &found[place * top_k * 2 + top_k]);
                }
            }
        } catch (const std::bad_alloc&) { failed |= 1; }
    }
    if (failed) return NO_MEMORY;
    if (kpieces == 1) return OK;

#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : failed)
    for (i64 item = 0; item < B * H * G; ++item) {
        try {
            const i64 bh = item / G, g = item % G;
            Workspace& w = workspace(bytes_of<std::int32_t>({std::size_t(kpieces) * top_k, std::size_t(kpieces) * top_k}));
            TopK all{w.take<std::int32_t>(std::size_t(kpieces) * top_k), w.take<std::int32_t>(std::size_t(kpieces) * top_k), 0};
            for (i64 p = 0; p < kpieces; ++p) {
                const std::size_t place = std::size_t((bh * kpieces + p) * G + g);
                const std::int32_t* from = &found[place * top_k * 2];
                std::copy(from, from + counts[place], all.score + all.n);
                std::copy(from + top_k, from + top_k + counts[place], all.index + all.n);
                all.n += counts[place];
            }
            all.shrink(top_k);
            for (int j = 0; j < top_k; ++j) selected[item * top_k + j] = all.index[j];
        } catch (const std::bad_alloc&) { failed |= 1; }
    }
    return failed ? NO_MEMORY : OK;
}

}  // namespace
