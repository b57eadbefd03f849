// bfloat16 and float16 as bits: a model may live in them, a chain does not (a step of 1e-6 is lost in their sums).
// Integer arithmetic that vectorizes, and that CPU and GPU share; rounding is to nearest, ties to even.
#pragma once

#include "philox.h"

namespace llc {

// The precision of a model whose chains keep float32: of its gradients, of the copy of w that a step writes, and of w*
// where that is the model's own.
enum class Low : int { none = 0, bfloat16 = 1, float16 = 2 };

inline namespace LLC_ISA {

LLC_HD float from_low(uint16_t bits, Low kind) {
    if (kind == Low::bfloat16) return bit_cast<float>(uint32_t(bits) << 16);
    const uint32_t magnitude = bits & 0x7FFFu;
    // 2^112 moves the exponent's bias from 15 to 127; subnormal halves come out normal.
    uint32_t u = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u));
    if (magnitude >= 0x7C00u) u |= 0x7F800000u;
    return bit_cast<float>(u | uint32_t(bits & 0x8000u) << 16);
}

LLC_HD uint16_t to_low(float value, Low kind) {
    const uint32_t u = bit_cast<uint32_t>(value), magnitude = u & 0x7FFFFFFFu, sign = u >> 16 & 0x8000u;
    if (kind == Low::bfloat16) {
        const uint32_t rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
        return uint16_t(magnitude > 0x7F800000u ? 0x7FC0u : rounded);
    }
    const uint32_t normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1u)) >> 13;
    // 0.5 has the spacing of subnormal halves: adding it rounds to them.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return uint16_t(sign | (magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal));
}

}  // namespace LLC_ISA
}  // namespace llc
