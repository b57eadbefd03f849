// The step kernels alone, without Python: what share of a copy's bytes per second each moves, of those that it must.
//
//     nvcc -arch=native -O3 -std=c++17 --fmad=false -DNDEBUG -DLLC_WITH_CUDA -I csrc benchmarks/gpu/bench_kernels.cu
//     ./a.out [PARAMETERS] [kernels.json]
//
// 10⁸ float32 parameters in 100 tensors, w of all of them in one piece, as chains keep it. A round is ten launches each
// of a copy, the step, the step without noise, and the step with sums that an estimate takes; figures are medians over
// rounds, the first not counted. Bytes are those of one pass: w* and a preconditioner once for all chains.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "step_cuda.cu"

using namespace llc;

namespace {

constexpr int kTensors = 100, kLaunches = 10, kRounds = 7;

struct Case {
    const char* name;
    Rule rule;
    int chains;
    int states;
    bool preconditioned;
    double bytes;  // of a parameter and chain
};

const Case kCases[] = {
    {"sgld", Rule::SGLD, 1, 0, false, 16},
    {"preconditioned-sgld", Rule::PreconditionedSGLD, 1, 0, true, 20},
    {"rmsprop-sgld", Rule::RMSpropSGLD, 1, 1, false, 24},
    {"adam-sgld", Rule::AdamSGLD, 1, 2, false, 32},
    {"sghmc", Rule::SGHMC, 1, 1, false, 24},
    {"sgld", Rule::SGLD, 4, 0, false, 13},
    {"preconditioned-sgld", Rule::PreconditionedSGLD, 4, 0, true, 14},
    {"rmsprop-sgld", Rule::RMSpropSGLD, 4, 1, false, 21},
    {"adam-sgld", Rule::AdamSGLD, 4, 2, false, 29},
    {"sghmc", Rule::SGHMC, 4, 1, false, 21},
};

// Memory that lives as long as a case.
class Memory {
  public:
    ~Memory() {
        cudaDeviceSynchronize();
        for (void* p : owned_) cudaFree(p);
    }
    template <class T>
    T* get(int64_t count) {
        void* p = nullptr;
        check(cudaMalloc(&p, count * sizeof(T)), "cudaMalloc");
        owned_.push_back(p);
        return static_cast<T*>(p);
    }
    float* normals(int64_t count, uint64_t seed) {
        float* p = get<float>(count);
        Normals request{};
        request.dtype = DType::float32, request.out = p, request.length = count, request.key.seed = seed;
        cuda_normals(request, nullptr);
        return p;
    }

  private:
    std::vector<void*> owned_;
};

template <class Run>
float milliseconds(cudaStream_t stream, Run run) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event"), check(cudaEventCreate(&end), "event");
    check(cudaEventRecord(begin, stream), "event");
    for (int k = 0; k < kLaunches; ++k) run(k);
    check(cudaEventRecord(end, stream), "event"), check(cudaEventSynchronize(end), "event");
    float taken = 0;
    check(cudaEventElapsedTime(&taken, begin, end), "event");
    cudaEventDestroy(begin), cudaEventDestroy(end);
    return taken / kLaunches;
}

double median(std::vector<float> times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

std::string measure(const Case& c, int64_t total, cudaStream_t stream) {
    Memory memory;
    const int64_t size = total / kTensors, n = size * kTensors;
    float *w = memory.normals(n * c.chains, 1), *states[2] = {};
    for (int k = 0; k < c.states; ++k) {
        states[k] = memory.get<float>(n * c.chains);
        check(cudaMemset(states[k], 0, n * c.chains * sizeof(float)), "cudaMemset");
    }
    std::vector<Segment> rows(kTensors);
    for (int k = 0; k < kTensors; ++k) {
        Segment& s = rows[k];
        s.offset = k * size, s.length = size, s.stride = n, s.grad_stride = size, s.w = w + k * size;
        s.grad = memory.normals(size * c.chains, 100 + k), s.reference = memory.normals(size, 200 + k);
        for (int j = 0; j < c.states; ++j) s.state[j] = states[j] + k * size;
        s.preconditioner_scale = 1, s.preconditioner = c.preconditioned ? memory.normals(size, 300 + k) : nullptr;
    }
    auto* table = memory.get<Segment>(kTensors);
    check(cudaMemcpy(table, rows.data(), kTensors * sizeof(Segment), cudaMemcpyHostToDevice), "cudaMemcpy");

    Step step{};
    step.rule = c.rule, step.dtype = DType::float32, step.low = Low::none, step.segments = table;
    step.num_segments = kTensors, step.end = n, step.num_chains = c.chains;
    step.scalars.lr = 1e-9, step.scalars.nbeta = 1000, step.scalars.localization = 1, step.scalars.noise_level = 1;
    step.scalars.bounding_box = 1e30, step.scalars.decay = 0.99, step.scalars.momentum_decay = 0.9;
    step.scalars.eps = 0.1, step.scalars.friction = 0.1, step.scalars.adapt_steps = 1e30;
    Step quiet = step, summed = step;
    quiet.scalars.noise_level = 0;
    summed.wanted = only(kDistanceSquare) | only(kBias);
    summed.sums = memory.get<double>(c.chains * kNumSums);
    summed.scratch = memory.get<double>(cuda_scratch_size(summed));
    float *from = memory.normals(n, 2), *to = memory.get<float>(n);

    const auto stepping = [&](Step request) {
        return milliseconds(stream, [&](int k) {
            request.key.step = k;
            cuda_step(request, stream);
        });
    };
    std::vector<float> times[4];
    for (int round = 0; round < kRounds; ++round) {
        const float taken[] = {
            milliseconds(
                stream,
                [&](int) { check(cudaMemcpyAsync(to, from, n * 4, cudaMemcpyDeviceToDevice, stream), "copy"); }),
            stepping(step), stepping(quiet), stepping(summed)};
        for (int k = 0; k < 4 && round > 0; ++k) times[k].push_back(taken[k]);
    }
    const double copy = 8.0 * n / median(times[0]), floor = c.bytes * n * c.chains;
    const double share[] = {floor / median(times[1]) / copy, floor / median(times[2]) / copy,
                            floor / median(times[3]) / copy};
    char row[400];
    std::snprintf(row, sizeof(row),
                  "{\"sampler\": \"%s\", \"chains\": %d, \"ms\": %.4f, \"floor, bytes\": %g, \"copy's GB/s\": %.0f, "
                  "\"share of copy's GB/s\": %.4f, \"without noise\": %.4f, \"with an estimate's sums\": %.4f}",
                  c.name, c.chains, median(times[1]), c.bytes, copy / 1e6, share[0], share[1], share[2]);
    std::printf(
        "%-20s %d chains  %7.3f ms  copy %4.0f GB/s  share %5.1f %%  without noise %5.1f %%  with sums %5.1f %%\n",
        c.name, c.chains, median(times[1]), copy / 1e6, 100 * share[0], 100 * share[1], 100 * share[2]);
    return row;
}

}  // namespace

int main(int count, char** arguments) {
    const int64_t total = count > 1 ? std::atoll(arguments[1]) : 100000000;
    cudaStream_t stream;
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    std::string rows;
    for (const Case& c : kCases) rows += (rows.empty() ? "" : ",\n  ") + measure(c, total, stream);
    if (count > 2) {
        std::FILE* file = std::fopen(arguments[2], "w");
        if (file == nullptr) return 1;
        std::fprintf(file, "{\"device\": \"cuda\", \"parameters\": %lld, \"rows\": [\n  %s\n]}\n", (long long)total,
                     rows.c_str());
        std::fclose(file);
    }
}
