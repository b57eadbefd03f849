// Four elements at a time: how the CUDA kernel finds, loads and stores what a step reads and writes.
#pragma once

#include <cuda_runtime.h>

#include "step.h"

namespace llc {
namespace {

constexpr int kThreads = 256;
constexpr int kQuad = 4;                     // elements of one thread at a time: one Philox counter, one 16-byte load
constexpr int kTile = kThreads * kQuad * 4;  // consecutive elements of one thread block at a time

template <class T>
struct alignas(sizeof(T) * kQuad < 16 ? sizeof(T) * kQuad : 16) Quad {
    T v[kQuad];
};

// Whether quads at p can be moved in the widest accesses (16 bytes, or 8 for low precision).
template <class T>
__device__ inline bool aligned(const T* p) {
    return (reinterpret_cast<uintptr_t>(p) & (alignof(Quad<T>) - 1)) == 0;
}

// The first segment that ends after element i.
__device__ inline int find_segment(const Segment* segments, int count, int64_t i) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (segments[middle].offset + segments[middle].length <= i) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Elements [from, to) of a quad.
struct Part {
    int from, to;
    __device__ bool has(int k) const { return k >= from && k < to; }
    __device__ uint32_t mask() const { return ~0u << 8 * from & ~0u >> 8 * (kQuad - to); }  // a byte for each element
};

__device__ inline int clamp(int64_t x, int high) {
    return x < 0 ? 0 : x > high ? high : int(x);
}

// What is read or written once in a step, which is all but w* and preconditioners, is the first to leave the caches:
// those are there for the next chain then. In the widest accesses.
template <class T>
__device__ inline Quad<T> load_once(const T* p) {
    constexpr int kWords = sizeof(Quad<T>) / 4;
    static_assert(kWords == 2 || kWords % 4 == 0, "one access, or several of 16 bytes");
    uint32_t bits[kWords];
    if constexpr (kWords == 2) {
        const uint2 x = __ldcs(reinterpret_cast<const uint2*>(p));
        bits[0] = x.x, bits[1] = x.y;
    } else {
#pragma unroll
        for (int k = 0; k < kWords; k += 4) {
            const uint4 x = __ldcs(reinterpret_cast<const uint4*>(p) + k / 4);
            bits[k] = x.x, bits[k + 1] = x.y, bits[k + 2] = x.z, bits[k + 3] = x.w;
        }
    }
    Quad<T> quad;
    memcpy(&quad, bits, sizeof(quad));
    return quad;
}

template <class T>
__device__ inline void store_once(T* p, const Quad<T>& quad) {
    constexpr int kWords = sizeof(Quad<T>) / 4;
    uint32_t bits[kWords];
    memcpy(bits, &quad, sizeof(quad));
    if constexpr (kWords == 2) {
        __stcs(reinterpret_cast<uint2*>(p), make_uint2(bits[0], bits[1]));
    } else {
#pragma unroll
        for (int k = 0; k < kWords; k += 4) {
            __stcs(reinterpret_cast<uint4*>(p) + k / 4, make_uint4(bits[k], bits[k + 1], bits[k + 2], bits[k + 3]));
        }
    }
}

// Whole quads, at aligned addresses, are one access.
template <bool kWhole, bool kOnce = false, class T>
__device__ inline void load_quad(T (&out)[kQuad], const T* p, Part part) {
    if (kWhole) {
        Quad<T> quad;
        if constexpr (kOnce) {
            quad = load_once(p);
        } else {
            quad = *reinterpret_cast<const Quad<T>*>(p);
        }
#pragma unroll
        for (int k = 0; k < kQuad; ++k) out[k] = quad.v[k];
    } else {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) out[k] = part.has(k) ? p[k] : T(0);
    }
}

template <bool kWhole, class T>
__device__ inline void store_quad(T* p, const T (&in)[kQuad], Part part) {
    if (kWhole) {
        Quad<T> quad;
#pragma unroll
        for (int k = 0; k < kQuad; ++k) quad.v[k] = in[k];
        store_once(p, quad);
    } else {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
            if (part.has(k)) p[k] = in[k];
        }
    }
}

// What one chain has of a segment inside a tile, as a thread keeps it in registers until it gets to the next segment:
// with the table read for every quad, the latency of those loads would come before that of the data's.
template <class Rule, class T>
struct View {
    int begin = 0, end = 0;  // in the tile, whose first element all addresses are of
    T *w, *state[2];
    const T* preconditioner;
    const void *grad, *reference;  // of T or of low precision
    const uint8_t* mask;
    uint16_t* copy;
    T preconditioner_scale;
    bool is_aligned;

    __device__ void load(const Step& step, int index, int64_t chain, int64_t tile) {
        begin = end = kTile;  // behind the last segment
        if (index >= step.num_segments) return;
        const Segment& s = step.segments[index];
        const int64_t start = tile * kTile - s.offset, row = chain * s.stride + start;
        begin = clamp(-start, kTile), end = clamp(s.length - start, kTile);
        w = static_cast<T*>(s.w) + row;
        is_aligned = aligned(w);
        const int64_t reference_row = chain * s.reference_stride + start;
        if (!step.low_reference) {
            reference = static_cast<const T*>(s.reference) + reference_row;
            is_aligned = is_aligned && aligned(static_cast<const T*>(reference));
        } else {
            reference = static_cast<const uint16_t*>(s.reference) + reference_row;
            is_aligned = is_aligned && aligned(static_cast<const uint16_t*>(reference));
        }
        const int64_t grad_row = chain * s.grad_stride + start;
        if (step.low == Low::none) {
            grad = static_cast<const T*>(s.grad) + grad_row;
            is_aligned = is_aligned && aligned(static_cast<const T*>(grad));
        } else {
            grad = static_cast<const uint16_t*>(s.grad) + grad_row;
            is_aligned = is_aligned && aligned(static_cast<const uint16_t*>(grad));
        }
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) {
            state[k] = static_cast<T*>(s.state[k]) + row;
            is_aligned = is_aligned && aligned(state[k]);
        }
        mask = s.mask ? s.mask + start : nullptr;
        copy = s.copy ? static_cast<uint16_t*>(s.copy) + row : nullptr;
        is_aligned = is_aligned && aligned(mask) && aligned(copy);
        if (Rule::kPreconditioned) {
            preconditioner = s.preconditioner ? static_cast<const T*>(s.preconditioner) + start : nullptr;
            preconditioner_scale = T(s.preconditioner_scale);
            is_aligned = is_aligned && aligned(preconditioner);
        }
    }
};

// Low-precision elements as they are, in the first half of where they will be: to convert them would be to wait for
// them.
template <bool kWhole, bool kOnce = false, class T>
__device__ inline void load_bits(T (&out)[kQuad], const void* p, int i, Part part) {
    uint16_t bits[kQuad];
    load_quad<kWhole, kOnce>(bits, static_cast<const uint16_t*>(p) + i, part);
    memcpy(out, bits, sizeof(bits));
}

template <class T>
__device__ inline void convert_bits(T (&out)[kQuad], Low low) {
    uint16_t bits[kQuad];
    memcpy(bits, out, sizeof(bits));
#pragma unroll
    for (int k = 0; k < kQuad; ++k) out[k] = T(from_low(bits[k], low));
}

// What a step reads of a quad, and what it writes.
template <class Rule, class T>
struct Operands {
    T w[kQuad], grad[kQuad], reference[kQuad], given[kQuad], state[2][kQuad];
    uint32_t mask;  // four bytes; 0: the element stays

    template <bool kWhole>
    __device__ void load(const View<Rule, T>& s, Low low, bool low_reference, int i, Part part) {
        load_quad<kWhole, true>(w, s.w + i, part);
        if (!low_reference) {
            load_quad<kWhole>(reference, static_cast<const T*>(s.reference) + i, part);
        } else {
            load_bits<kWhole>(reference, s.reference, i, part);
        }
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) load_quad<kWhole, true>(state[k], s.state[k] + i, part);
        if (Rule::kPreconditioned && s.preconditioner) load_quad<kWhole>(given, s.preconditioner + i, part);
        if (low == Low::none) {
            load_quad<kWhole, true>(grad, static_cast<const T*>(s.grad) + i, part);
        } else {
            load_bits<kWhole, true>(grad, s.grad, i, part);
        }
        mask = kWhole ? ~0u : part.mask();
        if (s.mask) {
            uint8_t bytes[kQuad];
            load_quad<kWhole>(bytes, s.mask + i, part);
            memcpy(&mask, bytes, sizeof(mask));
        }
    }

    __device__ bool moves(int k) const { return mask >> 8 * k & 0xFFu; }

    __device__ void convert(Low low, bool low_reference) {
        if (low == Low::none) return;
        convert_bits(grad, low);
        if (low_reference) convert_bits(reference, low);
    }

    template <bool kWhole>
    __device__ void store(const View<Rule, T>& s, Low low, int i, Part part) const {
        store_quad<kWhole>(s.w + i, w, part);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) store_quad<kWhole>(s.state[k] + i, state[k], part);
        if (s.copy) {
            uint16_t bits[kQuad];
#pragma unroll
            for (int k = 0; k < kQuad; ++k) bits[k] = to_low(float(w[k]), low);
            store_quad<kWhole>(s.copy + i, bits, part);
        }
    }
};

}  // namespace
}  // namespace llc
