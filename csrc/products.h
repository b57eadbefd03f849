// Products of small float32 matrices, for recorded kernels: without a dispatcher in front, and with what is vectorized
// chosen for matrices of which a few rows fill the registers.
#pragma once

#include <cstdint>

namespace llc {

// c[i] = a[i] b[i] (+ bias[i]) for i < batch; a is rows x depth, b is depth x columns. Strides count elements. Columns
// of c and of a bias lie side by side; a has adjacent rows or adjacent columns, and so has b.
//
// Each element is the sum over `depth` in its order, every term fused, from 0 on; the bias is added last. For a few
// columns beyond a multiple of 16 it is 16 such sums, added in pairs, if that is faster for their number and the depth.
// So its bits depend neither on the instruction set nor on the number of threads.
struct Product {
    int64_t batch, rows, columns, depth;  // at least 1
    int64_t a_batch, a_row, a_depth;      // a_row or a_depth is 1
    int64_t b_batch, b_depth, b_column;   // b_depth or b_column is 1
    int64_t bias_batch, bias_row;
    int64_t c_batch, c_row;
};

using Multiply = void (*)(const Product&, const float* a, const float* b, const float* bias, float* c, int num_threads);

// For this machine and LLC_FAST_ISA; null: there is none, leave it to torch. Throws std::runtime_error.
Multiply multiply_function();

}  // namespace llc
