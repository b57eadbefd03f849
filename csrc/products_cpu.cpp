// Compiled once per instruction set with fused multiply-adds, with LLC_ISA naming it.
#include "products.h"

#include <algorithm>
#include <new>

// GCC 12 warns of its own header's way to say "undefined".
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace llc {
inline namespace LLC_ISA {
namespace {

// A vector, and what reads and writes the first `n` of its lanes.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
using Vector = __m512;

struct Part {
    __mmask16 mask = 0;
    Part() = default;
    explicit Part(int64_t n) : mask(__mmask16((1u << n) - 1)) {}
    Vector load(const float* p) const { return _mm512_maskz_loadu_ps(mask, p); }
    void store(float* p, Vector v) const { _mm512_mask_storeu_ps(p, mask, v); }
};

inline Vector zero() {
    return _mm512_setzero_ps();
}
inline Vector everywhere(const float* p) {
    return _mm512_set1_ps(*p);
}
inline Vector load(const float* p) {
    return _mm512_loadu_ps(p);
}
inline void store(float* p, Vector v) {
    _mm512_storeu_ps(p, v);
}
inline Vector fused(Vector a, Vector b, Vector c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline Vector add(Vector a, Vector b) {
    return _mm512_add_ps(a, b);
}
#else
constexpr int kLanes = 8;
using Vector = __m256;

struct Part {
    __m256i mask = _mm256_setzero_si256();
    int64_t n = 0;
    Part() = default;
    explicit Part(int64_t n)
        : mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))), n(n) {}
    Vector load(const float* p) const { return _mm256_maskload_ps(p, mask); }
    void store(float* p, Vector v) const {  // AMD's masked stores take a dozen clocks
        if (n == 8) return _mm256_storeu_ps(p, v);
        __m128 low = _mm256_castps256_ps128(v);
        if (n & 4) _mm_storeu_ps(p, low), p += 4, low = _mm256_extractf128_ps(v, 1);
        if (n & 2) _mm_storel_pi(reinterpret_cast<__m64*>(p), low), p += 2, low = _mm_movehl_ps(low, low);
        if (n & 1) _mm_store_ss(p, low);
    }
};

inline Vector zero() {
    return _mm256_setzero_ps();
}
inline Vector everywhere(const float* p) {
    return _mm256_broadcast_ss(p);
}
inline Vector load(const float* p) {
    return _mm256_loadu_ps(p);
}
inline void store(float* p, Vector v) {
    _mm256_storeu_ps(p, v);
}
inline Vector fused(Vector a, Vector b, Vector c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline Vector add(Vector a, Vector b) {
    return _mm256_add_ps(a, b);
}
#endif

// A tile of c that the registers hold, by the number of vectors in its rows: 12 accumulators of 16 registers with AVX2,
// 12 to 24 of 32 with AVX-512. Two multiply-adds begin in a clock, and a result is there four clocks later.
constexpr int kMaxVectors = kLanes == 16 ? 4 : 3;
constexpr int tile_rows(int vectors) {
    constexpr int wide[] = {0, 14, 12, 8, 6}, narrow[] = {0, 8, 6, 4};
    return kLanes == 16 ? wide[vectors] : narrow[vectors];
}

// Some columns of one product: at most as many as a tile has. b and bias, where there is one, have them side by side.
struct Panel {
    const float *a, *b, *bias;
    float* c;
    int64_t a_row, a_depth, b_depth, bias_row, c_row, depth;
    int64_t last;  // columns of its last vector
};

// Rows [first, end) of a panel, kRows at a time. kAlong: rows of `a` lie along the depth, else its columns do.
template <int kRows, int kVectors, bool kAlong, bool kWhole>
void multiply_rows(const Panel& panel, int64_t first, int64_t end) {
    const Part part(panel.last);
    const auto load_part = [&](const float* p, int j) {
        return kWhole || j + 1 < kVectors ? load(p + j * kLanes) : part.load(p + j * kLanes);
    };
    const int64_t a_row = panel.a_row, a_depth = panel.a_depth, b_depth = panel.b_depth, depth = panel.depth;
    for (int64_t row = first; row < end; row += kRows) {
        Vector sums[kRows][kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sums[i][j] = zero();
        }
        // Addresses of every third row: processors add a stride, or twice a stride, for nothing.
        const float* starts[(kRows + 2) / 3];
#pragma GCC unroll 4
        for (int i = 0; i < (kRows + 2) / 3; ++i) starts[i] = panel.a + (row + 3 * i) * a_row;
        const float *a = starts[0], *b = panel.b;
#pragma GCC unroll 4
        for (int64_t k = 0; k < depth; ++k) {
            Vector columns[kVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) columns[j] = load_part(b, j);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                const Vector x = everywhere(kAlong ? starts[i / 3] + (i % 3) * a_row + k : a + i);
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j) sums[i][j] = fused(x, columns[j], sums[i][j]);
            }
            a += a_depth, b += b_depth;
        }
        float* c = panel.c + row * panel.c_row;
        const float* bias = panel.bias + (panel.bias ? row * panel.bias_row : 0);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) {
                const Vector sum = bias ? add(sums[i][j], load_part(bias, j)) : sums[i][j];
                if (kWhole || j + 1 < kVectors) {
                    store(c + j * kLanes, sum);
                } else {
                    part.store(c + j * kLanes, sum);
                }
            }
            c += panel.c_row;
            if (bias) bias += panel.bias_row;
        }
    }
}

template <int kRows, int kVectors, bool kAlong, bool kWhole>
void multiply_rows_by(int rows, const Panel& panel, int64_t first, int64_t end) {
    if constexpr (kRows > 0) {
        if (rows == kRows) return multiply_rows<kRows, kVectors, kAlong, kWhole>(panel, first, end);
        multiply_rows_by<kRows - 1, kVectors, kAlong, kWhole>(rows, panel, first, end);
    }
}

// Rows in tiles whose heights differ by one at most: a low tile would wait for its own results.
template <int kVectors, bool kAlong, bool kWhole>
void multiply_panel(const Panel& panel, int64_t first, int64_t end) {
    constexpr int kRows = tile_rows(kVectors);
    const int64_t tiles = (end - first + kRows - 1) / kRows, height = (end - first) / tiles;
    const int64_t higher = (end - first) % tiles, between = first + higher * (height + 1);
    if (higher) multiply_rows_by<kRows, kVectors, kAlong, kWhole>(int(height + 1), panel, first, between);
    multiply_rows_by<kRows, kVectors, kAlong, kWhole>(int(height), panel, between, end);
}

template <int kVectors>
void multiply_panel(const Panel& panel, int64_t first, int64_t end) {
    const bool along = panel.a_depth == 1, whole = panel.last == kLanes;
    auto* run = along ? (whole ? multiply_panel<kVectors, true, true> : multiply_panel<kVectors, true, false>)
                      : (whole ? multiply_panel<kVectors, false, true> : multiply_panel<kVectors, false, false>);
    run(panel, first, end);
}

void multiply_panel(int vectors, const Panel& panel, int64_t first, int64_t end) {
    if (vectors == 1) return multiply_panel<1>(panel, first, end);
    if (vectors == 2) return multiply_panel<2>(panel, first, end);
    if (vectors == 3) return multiply_panel<3>(panel, first, end);
    if constexpr (kMaxVectors > 3) multiply_panel<4>(panel, first, end);
}

// to[k * kTo + n] = from[k + n * stride] for k < depth and n < columns.
void transpose(const float* from, int64_t stride, int64_t depth, int64_t columns, float* to, int64_t to_depth) {
    const int64_t whole = depth / 8 * 8, wide = columns / 8 * 8;
    for (int64_t n = 0; n < wide; n += 8) {
        for (int64_t k = 0; k < whole; k += 8) {
            const float* p = from + n * stride + k;
            float* q = to + k * to_depth + n;
            __m256 r[8], s[8];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {  // rows i and i + 4 of the left half, then of the right half
                const float *low = p + i * stride, *high = p + (i + 4) * stride;
                r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
                r[i + 4] =
                    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
            }
#pragma GCC unroll 2
            for (int h = 0; h < 8; h += 4) {
                const __m256 even = _mm256_unpacklo_ps(r[h], r[h + 1]), odd = _mm256_unpackhi_ps(r[h], r[h + 1]);
                const __m256 even2 = _mm256_unpacklo_ps(r[h + 2], r[h + 3]);
                const __m256 odd2 = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
                s[h] = _mm256_shuffle_ps(even, even2, 0x44), s[h + 1] = _mm256_shuffle_ps(even, even2, 0xEE);
                s[h + 2] = _mm256_shuffle_ps(odd, odd2, 0x44), s[h + 3] = _mm256_shuffle_ps(odd, odd2, 0xEE);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) _mm256_storeu_ps(q + i * to_depth, s[i]);
        }
    }
    for (int64_t n = 0; n < columns; ++n) {
        for (int64_t k = n < wide ? whole : 0; k < depth; ++k) to[k * to_depth + n] = from[n * stride + k];
    }
}

// ---- Columns beyond a multiple of 16
// -----------------------------------------------------------------------------------
//
// Of a vector that holds two columns most lanes work for nothing: for 50 columns a quarter of all. So a few columns
// have lanes for something else, for rows of c where those of `a` lie side by side, or for the depth where it does.

constexpr int64_t kWide = 16;                 // lanes, for every instruction set: the order of sums is the same
constexpr int kHalves = int(kWide) / kLanes;  // vectors that hold as many
constexpr int64_t kMaxBeyond = 8, kMaxBeyondAlong = 4;

// How many of the last columns are done so.
int64_t columns_beyond(const Product& p) {
    const int64_t beyond = p.columns % kWide;
    if (p.a_depth != 1) return beyond <= kMaxBeyond ? beyond : 0;
    // Operations for each row with AVX2, those that add up 16 lanes among them, against a vector's.
    const int64_t own = beyond * (2 * ((p.depth + kWide - 1) / kWide) + 7);
    return beyond <= kMaxBeyondAlong && own < p.depth ? beyond : 0;
}

struct Columns {
    const float *a, *b, *bias;
    float* c;
    int64_t a_row, a_depth, b_depth, b_column, bias_row, c_row, depth;
};

void finish(const Columns& p, int64_t row, int column, float sum) {
    p.c[row * p.c_row + column] = p.bias ? sum + p.bias[row * p.bias_row + column] : sum;
}

// Lanes are rows: a_row is 1.
template <int kVectors, int kColumns>
void multiply_beside(const Columns& p, int64_t first, int64_t end) {
    constexpr int64_t kRows = kVectors * kLanes;
    for (int64_t row = first; row < end; row += kRows) {
        const int64_t rows = std::min(kRows, end - row);
        const auto sum_up = [&](auto load_rows) {
            Vector sums[kVectors][kColumns];
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) {
#pragma GCC unroll 4
                for (int j = 0; j < kColumns; ++j) sums[i][j] = zero();
            }
            const float *a = p.a + row, *b = p.b;
#pragma GCC unroll 2
            for (int64_t k = 0; k < p.depth; ++k) {
                Vector x[kVectors];
#pragma GCC unroll 4
                for (int i = 0; i < kVectors; ++i) x[i] = load_rows(a, i);
#pragma GCC unroll 4
                for (int j = 0; j < kColumns; ++j) {
                    const Vector y = everywhere(b + j * p.b_column);
#pragma GCC unroll 4
                    for (int i = 0; i < kVectors; ++i) sums[i][j] = fused(x[i], y, sums[i][j]);
                }
                a += p.a_depth, b += p.b_depth;
            }
            alignas(64) float found[kVectors][kColumns][kLanes];
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) {
#pragma GCC unroll 4
                for (int j = 0; j < kColumns; ++j) store(found[i][j], sums[i][j]);
            }
            for (int64_t r = 0; r < rows; ++r) {
                for (int j = 0; j < kColumns; ++j) finish(p, row + r, j, found[r / kLanes][j][r % kLanes]);
            }
        };
        if (rows == kRows) {
            sum_up([](const float* a, int i) { return load(a + i * kLanes); });
        } else {
            Part parts[kVectors];
            for (int i = 0; i < kVectors; ++i) parts[i] = Part(std::clamp<int64_t>(rows - i * kLanes, 0, kLanes));
            sum_up([&](const float* a, int i) { return parts[i].load(a + i * kLanes); });
        }
    }
}

inline __m256 halved(const Vector (&sums)[kHalves]) {
#if defined(__AVX512F__)
    return _mm256_add_ps(_mm512_castps512_ps256(sums[0]), _mm512_extractf32x8_ps(sums[0], 1));
#else
    return _mm256_add_ps(sums[0], sums[1]);
#endif
}

inline __m128 quartered(const Vector (&sums)[kHalves]) {
    const __m256 half = halved(sums);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Lanes are the depth, modulo 16: a_depth and b_depth are 1.
template <int kRows, int kColumns>
void multiply_along(const Columns& p, int64_t row) {
    Vector sums[kRows][kColumns][kHalves];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; ++h) sums[i][j][h] = zero();
        }
    }
    const float* a = p.a + row * p.a_row;
    const auto add_lanes = [&](int64_t k, auto load_lanes) {
        Vector y[kColumns][kHalves];
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; ++h) y[j][h] = load_lanes(p.b + j * p.b_column + k, h);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; ++h) {
                const Vector x = load_lanes(a + i * p.a_row + k, h);
#pragma GCC unroll 4
                for (int j = 0; j < kColumns; ++j) sums[i][j][h] = fused(x, y[j][h], sums[i][j][h]);
            }
        }
    };
    const int64_t whole = p.depth / kWide * kWide, rest = p.depth - whole;
    for (int64_t k = 0; k < whole; k += kWide) {
        add_lanes(k, [](const float* from, int h) { return load(from + h * kLanes); });
    }
    if (rest) {
        Part parts[kHalves];
        for (int h = 0; h < kHalves; ++h) parts[h] = Part(std::clamp<int64_t>(rest - h * kLanes, 0, kLanes));
        add_lanes(whole, [&](const float* from, int h) { return parts[h].load(from + h * kLanes); });
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
        __m128 fourths[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) fourths[j] = quartered(sums[i][j]);
        alignas(16) float found[4];
        _mm_store_ps(found, _mm_hadd_ps(_mm_hadd_ps(fourths[0], fourths[1]), _mm_hadd_ps(fourths[2], fourths[3])));
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) finish(p, row + i, j, found[j]);
    }
}

template <int kColumns>
void multiply_columns(const Columns& p, int64_t first, int64_t end) {
    if (p.a_depth != 1) return multiply_beside<kLanes == 16 ? 4 : 2, kColumns>(p, first, end);
    constexpr int kRows = kLanes == 16 ? 4 : kColumns <= 2 ? 2 : 1;
    int64_t row = first;
    for (; row + kRows <= end; row += kRows) multiply_along<kRows, kColumns>(p, row);
    for (; row < end; ++row) multiply_along<1, kColumns>(p, row);
}

// Rows [first, end) of the last `count` columns.
void multiply_columns(int64_t count, Columns p, int64_t first, int64_t end) {
    for (; count > 4; count -= 4, p.b += 4 * p.b_column, p.c += 4, p.bias += p.bias ? 4 : 0) {
        multiply_columns<4>(p, first, end);
    }
    if (count == 1) multiply_columns<1>(p, first, end);
    if (count == 2) multiply_columns<2>(p, first, end);
    if (count == 3) multiply_columns<3>(p, first, end);
    if (count == 4) multiply_columns<4>(p, first, end);
}

// ---- The product
// -------------------------------------------------------------------------------------------------------

// Rows [first, end) of one product. `turned`: room for a panel of b, where its columns do not lie side by side.
void multiply_one(const Product& p, const float* a, const float* b, const float* bias, float* c, int64_t first,
                  int64_t end, float* turned) {
    const int64_t beyond = columns_beyond(p), most = p.columns - beyond;
    const int64_t vectors = (most + kLanes - 1) / kLanes, panels = (vectors + kMaxVectors - 1) / kMaxVectors;
    for (int64_t k = 0; k < panels; ++k) {
        const int64_t from = vectors * k / panels, to = vectors * (k + 1) / panels;
        const int64_t column = from * kLanes, columns = std::min(most, to * kLanes) - column;
        Panel panel{a,
                    b + column * p.b_column,
                    bias ? bias + column : nullptr,
                    c + column,
                    p.a_row,
                    p.a_depth,
                    p.b_depth,
                    p.bias_row,
                    p.c_row,
                    p.depth,
                    columns - (to - from - 1) * kLanes};
        if (p.b_column != 1) {
            const int64_t width = (to - from) * kLanes;
            transpose(panel.b, p.b_column, p.depth, columns, turned, width);
            panel.b = turned, panel.b_depth = width;
        }
        multiply_panel(int(to - from), panel, first, end);
    }
    if (!beyond) return;
    Columns last{a,
                 b + most * p.b_column,
                 bias ? bias + most : nullptr,
                 c + most,
                 p.a_row,
                 p.a_depth,
                 p.b_depth,
                 p.b_column,
                 p.bias_row,
                 p.c_row,
                 p.depth};
    if (p.a_depth == 1 && p.b_depth != 1) {
        for (int64_t j = 0; j < beyond; ++j) {
            for (int64_t k = 0; k < p.depth; ++k) turned[j * p.depth + k] = last.b[k * p.b_depth + j];
        }
        last.b = turned, last.b_depth = 1, last.b_column = p.depth;
    }
    multiply_columns(beyond, last, first, end);
}

constexpr double kThreadWork = 2e6;  // multiply-adds: some 20 µs, several times what it takes to start a thread's work

void multiply(const Product& p, const float* a, const float* b, const float* bias, float* c, int num_threads) {
    const double work = double(p.batch) * double(p.rows) * double(p.columns) * double(p.depth);
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(num_threads, int64_t(work / kThreadWork)));
    // Pieces of the rows of each product of the batch.
    const int64_t pieces = std::min(p.rows, (threads + p.batch - 1) / p.batch), jobs = pieces * p.batch;
    const bool turns = p.b_column != 1 || (p.a_depth == 1 && p.b_depth != 1 && columns_beyond(p));
    const int64_t room = turns ? (p.depth * kMaxVectors * kLanes + kWide - 1) / kWide * kWide : 0;
    const auto cache_line = std::align_val_t(64);  // so that few vectors reach into two
    float* const turned =
        room ? static_cast<float*>(operator new[](sizeof(float) * size_t(threads * room), cache_line)) : nullptr;
    const auto run = [&](int64_t thread) {
        for (int64_t job = jobs * thread / threads; job < jobs * (thread + 1) / threads; ++job) {
            const int64_t i = job / pieces, piece = job % pieces;
            multiply_one(p, a + i * p.a_batch, b + i * p.b_batch, bias ? bias + i * p.bias_batch : nullptr,
                         c + i * p.c_batch, p.rows * piece / pieces, p.rows * (piece + 1) / pieces,
                         turned + thread * room);
        }
    };
    if (threads == 1) {  // not even an empty parallel region
        run(0);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t thread = 0; thread < threads; ++thread) run(thread);
    }
    if (turned) operator delete[](turned, cache_line);
}

}  // namespace
}  // namespace LLC_ISA

#define LLC_JOIN2(a, b) a##b
#define LLC_JOIN(a, b) LLC_JOIN2(a, b)
extern const Multiply LLC_JOIN(multiply_, LLC_ISA);
const Multiply LLC_JOIN(multiply_, LLC_ISA) = multiply;

}  // namespace llc
