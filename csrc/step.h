// What a step is given. The table of segments is built in Python as rows of 64-bit integers
// (llc_fast/update.py), so the layout of Segment is an interface: eight-byte fields only, in this order.
#pragma once

#include "langevin.h"

namespace llc {

// A contiguous run of parameters, present in every chain.
struct Segment {
    int64_t offset;    // index of its first element in the flat parameter vector; names its noise
    int64_t length;    // elements
    void* w;           // first element in the first chain
    int64_t w_stride;  // elements from a chain to the next
    const void* grad;
    int64_t grad_stride;    // 0: all chains share one gradient
    const void* anchor;     // shared by all chains; equal to w where a step needs none
    int64_t anchor_stride;  // 0, or w_stride where anchor is w
    const uint8_t* mask;    // 0: leave the element as it is; null: update all
};
static_assert(sizeof(Segment) == 9 * 8, "Segment must stay a row of nine 64-bit integers");

enum class DType : int { float32 = 0, float64 = 1 };

struct Step {
    DType dtype;
    const Segment* segments;  // sorted by offset, not overlapping; in the memory of the device that runs the step
    int64_t num_segments;
    int64_t begin, end;  // flat indices that the segments lie in
    int64_t num_chains;
    Scalars scalars;
    NoiseKey key;  // of the first chain; chain c uses key.chain + c
};

// Noise of flat elements [begin, begin + length), written to `out`.
struct Normals {
    DType dtype;
    void* out;
    int64_t begin, length;
    NoiseKey key;
};

// One implementation of the loop, compiled for one instruction set.
struct CpuBackend {
    const char* name;
    void (*step)(const Step&, int num_threads);
    void (*normals)(const Normals&);
};

// The best of those compiled that this machine runs, or the one LLC_FAST_ISA names. Throws
// std::runtime_error.
const CpuBackend& cpu_backend();

#ifdef LLC_WITH_CUDA
// Both launch on `stream` (a cudaStream_t) of the current device and do not wait. Throw std::runtime_error.
void cuda_step(const Step&, void* stream);
void cuda_normals(const Normals&, void* stream);
int cuda_device_count();
#endif

}  // namespace llc
