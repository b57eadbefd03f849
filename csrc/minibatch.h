// Which samples a minibatch holds: (seed, chain, step) -> indices, without replacement within an epoch.
//
// The order of an epoch is a permutation of 0 ... n - 1 that is computed, not stored: a Feistel network on the
// smallest power of two above n, whose results beyond n are sent through it again (cycle walking; Black & Rogaway,
// "Ciphers with arbitrary finite domains", 2002). So any chain's batch at any step is known without its past.
#pragma once

#include "philox.h"

namespace llc {

constexpr uint32_t kMinibatchStream = 2;  // of the noise key; 0 is Langevin noise, 1 initial momenta
constexpr int kFeistelRounds = 6;
constexpr int kFeistelMinBits = 8;  // tiny networks are poor ciphers

struct Minibatch {
    int64_t* out;  // [chain][batch_size]
    int64_t num_samples, batch_size, num_chains;
    NoiseKey key;                // of the first chain; chain c uses key.chain + c
    const int64_t* device_step;  // read instead of key.step when the kernel runs, if not null
};

inline namespace LLC_ISA {

// One chain's order of one epoch.
struct Permutation {
    uint64_t num_samples;
    int right_bits;
    uint32_t left_mask, right_mask;
    uint32_t keys[8];

    LLC_HD static uint32_t mix(uint32_t x, uint32_t key) {  // Murmur3's finalizer
        x = (x ^ key) * 0x9E3779B1u;
        x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
        x = (x ^ (x >> 13)) * 0xC2B2AE35u;
        return x ^ (x >> 16);
    }

    template <class Index>  // unsigned, with room for twice as many samples, and no less than 2^kFeistelMinBits
    LLC_HD Index once(Index x) const {
        uint32_t left = uint32_t(x >> right_bits), right = uint32_t(x) & right_mask;
        for (int round = 0; round < kFeistelRounds; round += 2) {
            left ^= mix(right, keys[round]) & left_mask;
            right ^= mix(left, keys[round + 1]) & right_mask;
        }
        return Index(left) << right_bits | right;
    }

    LLC_HD uint64_t walk(uint64_t x) const {
        while (x >= num_samples) x = once(x);
        return x;
    }
};

LLC_HD Permutation permutation(int64_t num_samples, NoiseKey key, uint64_t epoch) {
    Permutation p{};
    p.num_samples = uint64_t(num_samples);
    int bits = kFeistelMinBits;
    while (p.num_samples > uint64_t{1} << bits) ++bits;
    p.right_bits = bits / 2;
    p.right_mask = (1u << p.right_bits) - 1;
    p.left_mask = (1u << (bits - p.right_bits)) - 1;
    key.step = epoch;
    key.stream = kMinibatchStream;
    for (uint64_t half = 0; half < 2; ++half) {
        uint32_t c0 = uint32_t(half), c1 = counter_word1(key), c2 = counter_word2(key), c3 = counter_word3(key, half);
        philox(c0, c1, c2, c3, key.seed, ScalarMultiply{});
        const uint32_t words[4] = {c0, c1, c2, c3};
        for (int k = 0; k < 4; ++k) p.keys[4 * half + k] = words[k];
    }
    return p;
}

// Batches of an epoch do not overlap, and samples that would make a last, smaller one are left out.
LLC_HD Permutation minibatch_order(const Minibatch& batch, uint64_t step, int64_t chain, uint64_t& first) {
    const uint64_t batches = uint64_t(batch.num_samples / batch.batch_size);
    NoiseKey key = batch.key;
    key.chain += uint32_t(chain);
    first = step % batches * uint64_t(batch.batch_size);
    return permutation(batch.num_samples, key, step / batches);
}

}  // namespace LLC_ISA
}  // namespace llc
