// What a step is given. Python fills tables of Segment and Scalars as NumPy structured arrays
// (llc_fast/kernels/step.py) and compares its layout of them with the one that module.cpp exports, which lists their
// fields once more.
#pragma once

#include "langevin.h"
#include "low_precision.h"
#include "minibatch.h"

namespace llc {

// A contiguous run of parameters, present in every chain. Strides count elements from a chain to the next.
struct Segment {
    int64_t offset;  // index of its first element in the flat parameter vector; names its noise
    int64_t length;  // elements
    void* w;         // first element in the first chain
    int64_t stride;  // of w, the states and the copy
    const void* grad;
    int64_t grad_stride;         // 0: all chains share one gradient
    const void* reference;       // w*; equal to w where a step needs none
    int64_t reference_stride;    // 0: shared by all chains; `stride` where it is w
    const uint8_t* mask;         // 0: leave the element as it is; null: update all
    void* state[2];              // what the rule keeps; null where it keeps less
    const void* preconditioner;  // shared by all chains; null: preconditioner_scale alone
    double preconditioner_scale;
    void* copy;  // low-precision copy of w to write; null if none
};

enum class DType : int { float32 = 0, float64 = 1 };

struct Step {
    Rule rule;
    DType dtype;              // of w, w*, states and preconditioners
    Low low;                  // of gradients and copies, if not that of w
    bool low_reference;       // whether w* is in that precision, too: a model's own parameters, which need no copy
    const Segment* segments;  // sorted by offset, not overlapping; in the memory of the device that runs the step
    int64_t num_segments;
    int64_t begin, end;  // flat indices that the segments lie in
    int64_t num_chains;
    Scalars scalars;
    NoiseKey key;              // of the first chain; chain c uses key.chain + c
    const double* thermostat;  // one for each chain, or null
    SumSet wanted;             // what to sum up
    double* sums;              // [chain][kNumSums], overwritten, 0 where not wanted; null if nothing is
    double* scratch;           // for the sums: scratch_size() doubles (CUDA only)
    // CUDA graphs replay a launch with the values it was captured with; these are read when it runs, if not null.
    const Scalars* device_scalars;
    const int64_t* device_step;
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
    void (*minibatch)(const Minibatch&);
};

// The best of those compiled that this machine runs, or the one LLC_FAST_ISA names. Throws
// std::runtime_error.
const CpuBackend& cpu_backend();

#ifdef LLC_WITH_CUDA
// Doubles that a step of this size needs in Step::scratch when sums are wanted.
int64_t cuda_scratch_size(const Step&);
// These launch on `stream` (a cudaStream_t) of the current device and do not wait. Throw std::runtime_error.
void cuda_step(const Step&, void* stream);
void cuda_normals(const Normals&, void* stream);
void cuda_minibatch(const Minibatch&, void* stream);
int cuda_device_count();
#endif

}  // namespace llc
