// What the C++ kernels share: storage types, small matrix products held in registers, exp, and memory of a thread.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

#include "_simd.h"

namespace {

using i64 = std::int64_t;

// ------------------------------------------------------------------------------------------------ storage types
struct bf16 {
    std::uint16_t bits;
};
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
    if ((u & 0x7fffffffu) > 0x7f800000u) {  // NaN stays NaN
        p->bits = std::uint16_t((u >> 16) | 0x40);
        return;
    }
    p->bits = std::uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);  // round to nearest even
}

// ------------------------------------------------------------------------------------------------ small matrices
// C[R, V vectors] (+)= A[R, K] B[K, V vectors] with A(i, k) at a[i*ars + k*acs]; sums stay in registers.
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

// The same for any number of rows M.
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

// C[M, N] (+)= A[M, K] B[K, N]; N is a multiple of the vector length, B and C have packed rows.
template <class C, bool ADD>
void multiply(const C* a, i64 ars, i64 acs, const C* b, i64 ldb, C* c, i64 ldc, int M, int N, int K) {
    constexpr int W = LANES<C>;
    int j = 0;
    if (M < 4)  // few rows: more columns at once keep the multipliers busy
        for (; j + 4 * W <= N; j += 4 * W) rows<C, 4, ADD>(a, ars, acs, b + j, ldb, c + j, ldc, M, K);
    for (; j + 2 * W <= N; j += 2 * W) rows<C, 2, ADD>(a, ars, acs, b + j, ldb, c + j, ldc, M, K);
    for (; j < N; j += W) rows<C, 1, ADD>(a, ars, acs, b + j, ldb, c + j, ldc, M, K);
}

// C[M, panels] (+)= A[M, K] B, with B as panels of two vectors of columns, [panel][K][2 vectors], so that it is read from
// end to end. `next` is memory of `bytes` that will be wanted soon after, brought near along the way.
template <class C, bool ADD>
void multiply_panels(const C* a, i64 ars, i64 acs, const C* b, int panels, C* c, i64 ldc, int M, int K, const void* next, i64 bytes) {
    constexpr int P = 2 * LANES<C>;
    const char *ahead = static_cast<const char*>(next), *end = ahead + bytes;
    const i64 step = (bytes / ((M + 5) / 6 * panels) + 63) / 64 * 64;
    for (int i = 0; i < M; i += 6)
        for (int p = 0; p < panels; ++p) {
            for (const char* stop = std::min(end, ahead + step); ahead < stop; ahead += 64) __builtin_prefetch(ahead);
            rows<C, 2, ADD>(a + i * ars, ars, acs, b + i64(p) * K * P, P, c + i * ldc + p * P, ldc, std::min(6, M - i), K);
        }
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

// Lanes combined by `f`, first in vectors of 16 bytes, which every processor has.
template <class C, class F>
inline C across(vec<C> v, F f) {
    constexpr int N = 16 / sizeof(C);
    typedef C part __attribute__((vector_size(16)));
    part parts[VECTOR_BYTES / 16];
    std::memcpy(parts, &v, VECTOR_BYTES);
    for (int i = 1; i < VECTOR_BYTES / 16; ++i)
        for (int l = 0; l < N; ++l) parts[0][l] = f(parts[0][l], parts[i][l]);
    C result = parts[0][0];
    for (int l = 1; l < N; ++l) result = f(result, parts[0][l]);
    return result;
}
template <class C>
inline C horizontal_sum(vec<C> v) {
    return across<C>(v, [](C a, C b) { return a + b; });
}
template <class C>
inline C horizontal_max(vec<C> v) {
    return across<C>(v, [](C a, C b) { return a > b ? a : b; });
}

template <class C>
inline int padded(i64 n) {
    return int((n + LANES<C> - 1) / LANES<C> * LANES<C>);
}

// Memory without initial values, in large pages where it is large and the system has them.
class Memory {
    char* start = nullptr;

public:
    explicit Memory(std::size_t bytes) {
        const std::size_t unit = bytes < LARGE ? 64 : LARGE;
        start = static_cast<char*>(std::aligned_alloc(unit, std::max<std::size_t>(1, (bytes + unit - 1) / unit) * unit));
        if (!start) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (bytes >= LARGE) madvise(start, bytes, MADV_HUGEPAGE);
#endif
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { std::free(start); }
    char* get() const { return start; }

private:
    static constexpr std::size_t LARGE = std::size_t(2) << 20;
};

// Memory cut into arrays.
class Workspace {
    Memory memory;
    std::size_t used = 0;

public:
    explicit Workspace(std::size_t bytes) : memory(bytes) {}
    void clear() { used = 0; }
    template <class T>
    T* take(std::size_t n) {
        T* p = reinterpret_cast<T*>(memory.get() + used);
        used += (n * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};
// One that is used again and again; it grows with what is asked for.
class Spare {
    std::unique_ptr<Workspace> memory;
    std::size_t size = 0;

public:
    Workspace& ask(std::size_t bytes) {
        if (!memory || bytes > size) {
            memory.reset();
            memory.reset(new Workspace(bytes));
            size = bytes;
        }
        memory->clear();
        return *memory;
    }
    void shrink(std::size_t most) {
        if (size > most) memory.reset();
    }
};
// One of this thread, empty and of at least so many bytes; it is never shrunk, and goes with the thread.
inline Workspace& workspace(std::size_t bytes) {
    static thread_local Spare mine;
    return mine.ask(bytes);
}
// The same for memory that grows with the tokens: one per slot and thread, kept for the next call unless it is large.
// Fresh pages are dear: on a virtual machine, zeroing them took a quarter of a backward pass, or more.
template <int SLOT>
class Lent {
    static constexpr std::size_t KEPT = std::size_t(128) << 20;
    Spare& spare;
    Workspace& memory;
    static Spare& mine() {
        static thread_local Spare one;
        return one;
    }

public:
    explicit Lent(std::size_t bytes) : spare(mine()), memory(spare.ask(bytes)) {}
    Lent(const Lent&) = delete;
    Lent& operator=(const Lent&) = delete;
    ~Lent() { spare.shrink(KEPT); }
    template <class T>
    T* take(std::size_t n) {
        return memory.template take<T>(n);
    }
};
template <class C>
std::size_t bytes_of(std::initializer_list<std::size_t> counts) {
    std::size_t total = 64;
    for (std::size_t n : counts) total += (n * sizeof(C) + 63) / 64 * 64;
    return total;
}

}  // namespace
