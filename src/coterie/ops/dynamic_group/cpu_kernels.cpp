// Dynamic group attention on the CPU: group and select in one pass each, attend group by group, never hold more than a tile of scores.
//
// Plain C++17 with GCC/Clang vector extensions and OpenMP, no torch headers: compiles in seconds, called through ctypes.
// Layout of all token tensors: element (b, h, t, i) at b*strides[0] + h*strides[1] + t*strides[2] + i. Arithmetic is float (double for
// double tensors). Work is cut into pieces that do not depend on the number of threads, and sums run in a fixed order:
// results are the same bits for any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "_simd.h"

namespace {

using i64 = std::int64_t;

constexpr int TILE = 48;     // queries per tile: scores of a tile stay in the first-level caches
constexpr int CHUNK = 1024;  // queries per piece of work: a giant group is shared among threads
constexpr int OK = 0, BAD_ASSIGNMENT = 1, BAD_SELECTED = 2, NO_MEMORY = 3;

// ---------------------------------------------------------------------------------------------------------------- storage types
struct bf16 { std::uint16_t bits; };
inline float load(bf16 x) {
    std::uint32_t u = std::uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline void store(float* p, float x) { *p = x; }
inline void store(double* p, double x) { *p = x; }
inline void store(bf16* p, float x) {
    std::uint32_t u;
    std::memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) { p->bits = std::uint16_t((u >> 16) | 0x40); return; }  // NaN stays NaN
    p->bits = std::uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);                             // round to nearest even
}

// ---------------------------------------------------------------------------------------------------------------- small matrices
// C[M, N] (+)= A[M, K] B[K, N] with A(i, k) at a[i*ars + k*acs]; N is a multiple of the vector length, B and C are packed rows.
template <class C, int R, int V, bool ADD>
inline void block(const C* a, i64 ars, i64 acs, const C* b, i64 ldb, C* c, i64 ldc, int K) {
    constexpr int W = LANES<C>;
    vec<C> sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = ADD ? at(c + r * ldc + v * W) : vec<C>{};
    for (int k = 0; k < K; ++k) {
        vec<C> row[V];
        for (int v = 0; v < V; ++v) row[v] = at(b + k * ldb + v * W);
        for (int r = 0; r < R; ++r) {
            const C x = a[r * ars + k * acs];
            for (int v = 0; v < V; ++v) sum[r][v] += x * row[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) at(c + r * ldc + v * W) = sum[r][v];
}

template <class C, int V, bool ADD>
inline void rows(const C* a, i64 ars, i64 acs, const C* b, i64 ldb, C* c, i64 ldc, int M, int K) {
    int i = 0;
    for (; i + 6 <= M; i += 6) block<C, 6, V, ADD>(a + i * ars, ars, acs, b, ldb, c + i * ldc, ldc, K);
    a += i * ars;
    c += i * ldc;
    switch (M - i) {
        case 5: return block<C, 5, V, ADD>(a, ars, acs, b, ldb, c, ldc, K);
        case 4: return block<C, 4, V, ADD>(a, ars, acs, b, ldb, c, ldc, K);
        case 3: return block<C, 3, V, ADD>(a, ars, acs, b, ldb, c, ldc, K);
        case 2: return block<C, 2, V, ADD>(a, ars, acs, b, ldb, c, ldc, K);
        case 1: return block<C, 1, V, ADD>(a, ars, acs, b, ldb, c, ldc, K);
    }
}

template <class C, bool ADD>
void multiply(const C* a, i64 ars, i64 acs, const C* b, i64 ldb, C* c, i64 ldc, int M, int N, int K) {
    constexpr int W = LANES<C>;
    int j = 0;
    if (M < 4)  // few rows: more columns at once keep the multipliers busy
        for (; j + 4 * W <= N; j += 4 * W) rows<C, 4, ADD>(a, ars, acs, b + j, ldb, c + j, ldc, M, K);
    for (; j + 2 * W <= N; j += 2 * W) rows<C, 2, ADD>(a, ars, acs, b + j, ldb, c + j, ldc, M, K);
    for (; j < N; j += W) rows<C, 1, ADD>(a, ars, acs, b + j, ldb, c + j, ldc, M, K);
}

inline vfloat exponential(vfloat x) {  // relative error 2e-7 on (-87, 88); below it flushes to zero
    const vint below = x < -87.0f;
    const vfloat shifted = x * 1.44269504088896341f + 12582912.0f;  // round to integer in the low bits of the mantissa
    const vfloat n = shifted - 12582912.0f;
    vfloat r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vint power = (reinterpret_cast<const vint&>(shifted) + (127 - 0x4B400000)) << 23;
    const vfloat y = p * reinterpret_cast<const vfloat&>(power);
    const vint kept = reinterpret_cast<const vint&>(y) & ~below;
    return reinterpret_cast<const vfloat&>(kept);
}
inline vdouble exponential(vdouble x) {
    for (int l = 0; l < LANES<double>; ++l) x[l] = std::exp(x[l]);
    return x;
}

template <class C> inline C horizontal_sum(vec<C> v) {
    C s = 0;
    for (int l = 0; l < LANES<C>; ++l) s += v[l];
    return s;
}

template <class C> inline int padded(i64 n) { return int((n + LANES<C> - 1) / LANES<C> * LANES<C>); }

// A block of memory of this thread, cut into arrays; grows, is never shrunk, and goes with the thread.
class Workspace {
    std::unique_ptr<char[]> memory;
    std::size_t size = 0, used = 0;
public:
    void reserve(std::size_t bytes) {
        if (bytes > size) { memory.reset(); size = 0; memory.reset(new char[bytes + 64]); size = bytes; }
        used = (64 - reinterpret_cast<std::uintptr_t>(memory.get()) % 64) % 64;
    }
    template <class T> T* take(std::size_t n) {
        T* p = reinterpret_cast<T*>(memory.get() + used);
        used += (n * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};
template <class C> std::size_t bytes_of(std::initializer_list<std::size_t> counts) {
    std::size_t total = 64;
    for (std::size_t n : counts) total += (n * sizeof(C) + 63) / 64 * 64;
    return total;
}
Workspace& workspace() {
    static thread_local Workspace w;
    return w;
}

// ---------------------------------------------------------------------------------------------------------------- assignment, selection
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

// Rows lie far apart (other heads, q, k and v stand between them), which the hardware does not foresee: ask for a row well before it is read.
constexpr int AHEAD = 12;
template <class T>
inline void prefetch(const T* row, int d) {
    for (int i = 0; i < d; i += int(64 / sizeof(T))) __builtin_prefetch(row + i);
}

// Rows x[index[r]] as the columns of out (d, ld), those beyond n zero; index == nullptr takes rows 0, 1, 2, ... Eight rows at a time, so that stores are contiguous.
template <class T, class C>
inline void gather_transposed(const T* x, i64 stride, const std::int32_t* index, int n, int d, C* out, int ld) {
    int r = 0;
    for (; r + 8 <= n; r += 8) {
        const T* row[8];
        for (int l = 0; l < 8; ++l) {
            row[l] = x + (index ? index[r + l] : r + l) * stride;
            if (r + l + AHEAD < n) prefetch(x + (index ? index[r + l + AHEAD] : r + l + AHEAD) * stride, d);
        }
        for (int i = 0; i < d; ++i) {
            C* to = out + i64(i) * ld + r;
            for (int l = 0; l < 8; ++l) to[l] = C(load(row[l][i]));
        }
    }
    for (; r < ld; ++r) {
        const T* row = r < n ? x + (index ? index[r] : r) * stride : nullptr;
        for (int i = 0; i < d; ++i) out[i64(i) * ld + r] = row ? C(load(row[i])) : C(0);
    }
}

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
        Workspace& w = workspace();
        const int Tp = padded<float>(std::min<i64>(TOKENS, to - from));
        w.reserve(bytes_of<float>({std::size_t(d) * Tp, std::size_t(G) * Tp}));
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
            Workspace& w = workspace();
            w.reserve(bytes_of<float>({std::size_t(d) * Tp, std::size_t(G) * Tp, std::size_t(G), std::size_t(G) * room, std::size_t(G) * room,
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
            Workspace& w = workspace();
            w.reserve(bytes_of<std::int32_t>({std::size_t(kpieces) * top_k, std::size_t(kpieces) * top_k}));
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

// Rows x[index[r]] as packed rows of `ld`, times a factor; index == nullptr takes rows 0, 1, 2, ...
template <class T, class C>
inline void gather(const T* x, i64 stride, const std::int32_t* index, int n, int d, C factor, C* out, int ld) {
    for (int r = 0; r < n; ++r) {
        const T* row = x + (index ? index[r] : r) * stride;
        if (r + AHEAD < n) prefetch(x + (index ? index[r + AHEAD] : r + AHEAD) * stride, d);
        C* to = out + i64(r) * ld;
        for (int i = 0; i < d; ++i) to[i] = C(load(row[i])) * factor;
        for (int i = d; i < ld; ++i) to[i] = 0;
    }
}

// Turns scores into weights before division by their sum; gives (largest score, sum), (-inf, 0) if every score is -inf.
template <class C>
inline void soften(C* row, int n, C& peak, C& total) {
    constexpr int W = LANES<C>;
    vec<C> most = at(row);
    for (int j = W; j < n; j += W) most = at(row + j) > most ? at(row + j) : most;
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
    for (int g = 0; g < s.G; ++g)
        for (int j = 0; j < s.K; ++j) {
            const i64 key = chosen[i64(g) * s.K + j];
            if (key < 0 || key >= s.Lk) return BAD_SELECTED;
            if (!m || m[key]) bias[i64(g) * Lp + key] = 0;
        }
    return OK;
}

template <class T, class C>
int forward_dense(const T* q, const T* k, const T* v, const i64* assignment, const i64* selected, const std::uint8_t* mask, T* out, C* lse,
                  const Shape& s, const i64* qs, const i64* ks, const i64* vs, double scale, int threads) {
    constexpr int W = LANES<C>;
    const int L = int(s.Lk), Lp = padded<C>(L), dp = padded<C>(s.dv);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : failed)
    for (i64 bh = 0; bh < s.B * s.H; ++bh) {
        try {
            const i64 b = bh / s.H, h = bh % s.H;
            Workspace& w = workspace();
            w.reserve(bytes_of<C>({std::size_t(s.G) * Lp, std::size_t(s.d) * Lp, std::size_t(L) * dp, std::size_t(TILE) * s.d,
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
                    C* row = score + i64(r) * Lp;
                    for (int j = 0; j < Lp; j += W) at(row + j) += at(bias + g * Lp + j);
                    soften(row, Lp, peak[r], total[r]);
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
            Workspace& w = workspace();
            w.reserve(bytes_of<C>({std::size_t(s.G) * Lp, std::size_t(s.d) * Lp, std::size_t(s.dv) * Lp, std::size_t(L) * dp, std::size_t(L) * dp,
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
            Workspace& w = workspace();
            w.reserve(bytes_of<C>({std::size_t(Kp), std::size_t(s.d) * Kp, std::size_t(s.K) * dp, std::size_t(TILE) * s.d, std::size_t(TILE) * Kp,
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
                    soften(row, np, peak[r], total[r]);
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
                Workspace& w = workspace();
                for (auto p = first_piece(bh); p != pieces.end() && p->bh == bh; ++p) {
                    w.reserve(scratch);
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
            Workspace& w = workspace();
            w.reserve(scratch);
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
            Workspace& w = workspace();
            w.reserve(scratch);
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
