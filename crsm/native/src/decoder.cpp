#include "decoder.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "threads.hpp"

namespace crsm {
namespace {

// Under this many multiply-adds a step (about a millisecond of one core) the step is one thread's: a second one has to be
// woken, and at three barriers a layer it costs more than it gains once another program wants its core.
constexpr int64_t kWorthATeam = 60'000'000;

// Weights of a layer up to this stay in a core's second-level cache while many rows pass by.
constexpr int64_t kSmallLayer = int64_t{512} << 10;

// Rows that pass through a layer together: whole tiles of the products of every instruction set.
constexpr int64_t kChunk = 24;

// States of a batch beyond this do not stay in a cache from one token to the next.
constexpr int64_t kCachedStates = int64_t{2} << 20;

constexpr size_t kLine = 64;

// Hands out pieces of one block of memory; with no block it only counts.
class Arena {
public:
    explicit Arena(void* data) : data_(static_cast<char*>(data)) {}
    template <typename T>
    T* take(int64_t count) {
        char* at = data_ == nullptr ? nullptr : data_ + used_;
        used_ += (static_cast<size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
        return reinterpret_cast<T*>(at);
    }
    size_t used() const { return used_; }

private:
    char* data_;
    size_t used_ = 0;
};

PackedMatrix take_matrix(Arena& arena, WeightType type, int64_t rows_K, int64_t columns_N) {
    PackedMatrix matrix{rows_K, columns_N, type, nullptr, nullptr};
    matrix.panels = arena.take<char>(packed_floats(rows_K, columns_N) * bytes_of(type));
    if (type == WeightType::int8) matrix.scales = arena.take<float>(scale_floats(rows_K, columns_N));
    return matrix;
}

// All weights but the embedding, in the order in which a step reads them.
void lay_out(Arena& arena, const DecodeSizes& sizes, WeightType type, bool has_head, std::vector<DecodeLayer>& layers,
             DecodeHead& head) {
    for (DecodeLayer& layer : layers) {
        layer.norm_D = arena.take<float>(sizes.d_model);
        layer.in_proj = take_matrix(arena, type, sizes.d_model, sizes.projected());
        layer.conv_weight_KC = arena.take<float>(sizes.d_conv * sizes.conv_channels());
        layer.conv_bias_C = arena.take<float>(sizes.conv_channels());
        layer.dt_bias_H = arena.take<float>(sizes.n_heads);
        layer.A_H = arena.take<float>(sizes.n_heads);
        layer.D_H = arena.take<float>(sizes.n_heads);
        layer.gated_norm_E = arena.take<float>(sizes.d_inner());
        layer.out_proj = take_matrix(arena, type, sizes.d_inner(), sizes.d_model);
    }
    if (has_head) {
        head.fusion_L = arena.take<float>(sizes.n_layer);
        head.norm_D = arena.take<float>(sizes.d_model);
        head.lm_head = take_matrix(arena, type, sizes.d_model, sizes.vocab_size);
    }
}

void copy(const float* from, const float* to, int64_t count) {
    std::memcpy(const_cast<float*>(to), from, static_cast<size_t>(count) * sizeof(float));
}

// B[k, n] = weight[n, k], into the memory that the layout gave.
void pack_transposed(PackedMatrix& matrix, const float* weight_NK, int threads) {
    matrix = pack_as(matrix.type, weight_NK, 1, matrix.rows_K, matrix.rows_K, matrix.columns_N,
                     const_cast<void*>(matrix.panels), const_cast<float*>(matrix.scales), threads);
}

// Hands out [0, total) in pieces that shrink towards the end, so that the members of a team finish together.
template <typename F>
void share(std::atomic<int64_t>& next, int64_t total, int members, F&& body) {
    if (members == 1) return body(0, total);
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < total) {
        int64_t count = (total - begin) / (2 * members);
        count = count > 4 ? count / 4 * 4 : count < 1 ? 1 : count;
        if (!next.compare_exchange_weak(begin, begin + count, std::memory_order_relaxed)) continue;
        body(begin, begin + count);
        begin = next.load(std::memory_order_relaxed);
    }
}

}  // namespace

int TeamChoice::next(int64_t kind, int wanted) {
    if (kind != kind_) *this = TeamChoice();
    kind_ = kind;
    const bool team_is_faster = alone_ == 0 || (team_ > 0 && team_ <= alone_);
    const bool trial = steps_++ % kTrialEvery == 2;
    return team_is_faster != trial ? wanted : 1;
}

void TeamChoice::took(int members, double seconds) {
    double& mean = members == 1 ? alone_ : team_;
    mean = mean == 0 ? seconds : mean + kNewest * (seconds - mean);
}

Decoder::Decoder(const DecodeSizes& sizes, WeightType type, bool has_head) : has_head_(has_head) {
    model_.sizes = sizes;
    layers_.resize(static_cast<size_t>(sizes.n_layer));
    Arena count(nullptr);
    lay_out(count, sizes, type, has_head, layers_, model_.head);
    weights_ = std::make_shared<Pages>(count.used());
    Arena arena(weights_->data());
    lay_out(arena, sizes, type, has_head, layers_, model_.head);
    bytes_of_weights_ = static_cast<int64_t>(count.used()) +
                        sizes.vocab_size * sizes.d_model * static_cast<int64_t>(sizeof(float));
}

Decoder::Decoder(const Decoder& other, const std::lock_guard<std::mutex>&)
    : model_(other.model_),
      layers_(other.layers_),
      has_head_(other.has_head_),
      bytes_of_weights_(other.bytes_of_weights_),
      weights_(other.weights_),
      pool_(other.pool_) {}

std::shared_ptr<Decoder> Decoder::sibling() const {
    const std::lock_guard<std::mutex> lock(busy_);
    return std::shared_ptr<Decoder>(new Decoder(*this, lock));
}

void Decoder::set_embedding(const float* embedding_VD) {
    const std::lock_guard<std::mutex> lock(busy_);
    model_.embedding_VD = embedding_VD;
}

void Decoder::pack_layer(int64_t index, const LayerSource& source, int threads) {
    const std::lock_guard<std::mutex> lock(busy_);
    const DecodeSizes& sizes = model_.sizes;
    DecodeLayer& layer = layers_.at(static_cast<size_t>(index));
    const int64_t C = sizes.conv_channels(), K = sizes.d_conv;
    copy(source.norm_D, layer.norm_D, sizes.d_model);
    pack_transposed(layer.in_proj, source.in_proj_MD, threads);
    float* taps_KC = const_cast<float*>(layer.conv_weight_KC);
    for (int64_t c = 0; c < C; ++c) {
        for (int64_t k = 0; k < K; ++k) taps_KC[k * C + c] = source.conv_weight_CK[c * K + k];
    }
    copy(source.conv_bias_C, layer.conv_bias_C, C);
    copy(source.dt_bias_H, layer.dt_bias_H, sizes.n_heads);
    copy(source.A_H, layer.A_H, sizes.n_heads);
    copy(source.D_H, layer.D_H, sizes.n_heads);
    copy(source.gated_norm_E, layer.gated_norm_E, sizes.d_inner());
    pack_transposed(layer.out_proj, source.out_proj_DE, threads);
}

void Decoder::pack_head(const float* fusion_L, const float* norm_D, const float* lm_head_VD, int threads) {
    const std::lock_guard<std::mutex> lock(busy_);
    copy(fusion_L, model_.head.fusion_L, model_.sizes.n_layer);
    copy(norm_D, model_.head.norm_D, model_.sizes.d_model);
    pack_transposed(model_.head.lm_head, lm_head_VD, threads);
}

void Decoder::reserve(DecodeStep& step) {
    const DecodeSizes& sizes = model_.sizes;
    for (int pass = 0; pass < 2; ++pass) {
        Arena arena(pass == 0 ? nullptr : scratch_.data());
        step.scaled_BD = arena.take<float>(step.batch * sizes.d_model);
        step.square_BJ = arena.take<float>(step.batch * sizes.pieces());
        step.projected_BM = arena.take<float>(step.batch * sizes.projected());
        step.gated_BE = arena.take<float>(step.batch * sizes.d_inner());
        step.square_BH = arena.take<float>(step.batch * sizes.n_heads);
        step.out_BD = arena.take<float>(step.batch * sizes.d_model);
        step.mixed_BD = arena.take<float>(step.batch * sizes.d_model);
        if (pass == 0 && arena.used() > scratch_.size()) scratch_ = Pages(arena.used());
    }
}

int Decoder::worthwhile(int64_t batch, bool layers, bool head, int threads) const {
    const DecodeSizes& sizes = model_.sizes;
    int64_t weights = head ? sizes.d_model * sizes.vocab_size : 0, states = 0;
    if (layers) {
        weights += sizes.n_layer * sizes.d_model * (sizes.projected() + sizes.d_inner());
        states = sizes.n_layer * sizes.d_inner() * sizes.d_state;
    }
    // One row reads as much memory as several do; a number of the state is read and written, and worked on twice.
    const int64_t work = weights * (batch > 4 ? batch : 4) + 8 * states * batch;
    const int wanted = threads > 0 ? threads : num_threads();
    return work < kWorthATeam ? 1 : wanted;
}

bool Decoder::layers_are_small() const {
    const PackedMatrix &in = layers_.front().in_proj, &out = layers_.front().out_proj;
    const int64_t elements = packed_floats(in.rows_K, in.columns_N) + packed_floats(out.rows_K, out.columns_N);
    return elements * bytes_of(in.type) <= kSmallLayer;
}

const float* Decoder::norm_after(int64_t layer, bool head) const {
    if (layer + 1 < model_.sizes.n_layer) return layers_[static_cast<size_t>(layer) + 1].norm_D;
    return head ? model_.head.norm_D : nullptr;
}

void Decoder::step(DecodeStep step, int threads) {
    const std::lock_guard<std::mutex> lock(busy_);
    if (step.batch < 1) return;
    reserve(step);
    const DecodeSizes& sizes = model_.sizes;
    const bool head = step.logits_BV != nullptr;
    step.past_caches =
        !step.branches() && step.ssm_in[0] != step.ssm_out[0] &&
        sizes.n_layer * step.batch * sizes.d_inner() * sizes.d_state > kCachedStates;
    int members = worthwhile(step.batch, true, head, threads);
    const bool chosen = members > 1;
    if (chosen) members = choice_.next(2 * step.batch + (head ? 1 : 0), members);
    const auto start = std::chrono::steady_clock::now();
    if (layers_are_small()) {
        step_by_rows(step, members);
    } else {
        step_by_panels(step, members);
    }
    if (chosen) {
        choice_.took(members, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
}

// A member takes rows through all layers: nobody waits for anybody, and what a row leaves between the phases stays near.
void Decoder::step_by_rows(const DecodeStep& step, int members) {
    const DecodeTable& table = decode_table();
    const DecodeSizes& sizes = model_.sizes;
    const bool head = step.logits_BV != nullptr;
    const int64_t chunks = (step.batch + kChunk - 1) / kChunk;
    const auto rows_of = [&](int64_t begin, int64_t end) {
        DecodeStep part = step;
        part.batch = end - begin;
        part.token_B += begin;
        part.first += begin;
        if (part.place_B != nullptr) part.place_B += begin;
        if (part.carried_BL != nullptr) part.carried_BL += begin * sizes.n_layer;
        if (part.decay_LBH != nullptr) part.decay_LBH += begin * sizes.n_heads;
        if (part.branches()) {
            part.from_B += begin;
            part.state_B += begin;
            part.branch_B += begin;
        }
        if (head) part.logits_BV += begin * sizes.vocab_size;
        part.scaled_BD += begin * sizes.d_model;
        part.square_BJ += begin * sizes.pieces();
        part.projected_BM += begin * sizes.projected();
        part.gated_BE += begin * sizes.d_inner();
        part.square_BH += begin * sizes.n_heads;
        part.out_BD += begin * sizes.d_model;
        part.mixed_BD += begin * sizes.d_model;
        return part;
    };
    std::atomic<int64_t> next{0};
    parallel_team(members, [&](int, int present) {
        share(next, chunks, present, [&](int64_t first, int64_t last) {
            const int64_t begin = first * kChunk, end = std::min(last * kChunk, step.batch);
            table.embed(model_, rows_of(begin, end), layers_.front().norm_D);
            for (int64_t index = 0; index < sizes.n_layer; ++index) {
                const DecodeLayer& layer = layers_[static_cast<size_t>(index)];
                for (int64_t row = begin; row < end; row += kChunk) {
                    const int64_t stop = std::min(row + kChunk, end);
                    DecodeStep part = rows_of(row, stop);
                    // What no later phase reads again: the same memory for every chunk, still in the first caches.
                    part.projected_BM = step.projected_BM + begin * sizes.projected();
                    part.gated_BE = step.gated_BE + begin * sizes.d_inner();
                    part.out_BD = step.out_BD + begin * sizes.d_model;
                    table.project_in(model_, layer, part, index, 0, layer.in_proj.num_panels());
                    if (part.branches()) {
                        table.read_branches(model_, layer, part, index, 0, part.batch);
                    } else {
                        table.update_state(model_, layer, part, index, 0, part.batch * sizes.n_heads);
                    }
                    table.project_out(model_, layer, part, index, norm_after(index, head), 0,
                                      layer.out_proj.num_panels());
                }
            }
            if (head) table.project_logits(model_, rows_of(begin, end), 0, model_.head.lm_head.num_panels());
        });
    });
}

// The members share the panels of every product and the heads of all rows, and wait for each other after each phase.
void Decoder::step_by_panels(const DecodeStep& step, int members) {
    const DecodeTable& table = decode_table();
    const DecodeSizes& sizes = model_.sizes;
    const bool head = step.logits_BV != nullptr;
    const int64_t phases = 3 * sizes.n_layer + 1;
    if (phases_.size() < static_cast<size_t>(phases)) phases_ = std::vector<Phase>(static_cast<size_t>(phases));
    for (Phase& phase : phases_) phase.next.store(0, std::memory_order_relaxed);
    table.embed(model_, step, layers_.front().norm_D);
    Barrier whole(members), alone(1);
    parallel_team(members, [&](int, int present) {
        Barrier& barrier = present == 1 ? alone : whole;
        for (int64_t index = 0; index < sizes.n_layer; ++index) {
            const DecodeLayer& layer = layers_[static_cast<size_t>(index)];
            Phase* phase = &phases_[static_cast<size_t>(3 * index)];
            share(phase[0].next, layer.in_proj.num_panels(), present,
                  [&](int64_t begin, int64_t end) { table.project_in(model_, layer, step, index, begin, end); });
            barrier.wait();
            share(phase[1].next, step.branches() ? step.batch : step.batch * sizes.n_heads, present,
                  [&](int64_t begin, int64_t end) {
                      const auto read = step.branches() ? table.read_branches : table.update_state;
                      read(model_, layer, step, index, begin, end);
                  });
            barrier.wait();
            share(phase[2].next, layer.out_proj.num_panels(), present, [&](int64_t begin, int64_t end) {
                table.project_out(model_, layer, step, index, norm_after(index, head), begin, end);
            });
            barrier.wait();
        }
        if (head) {
            share(phases_[static_cast<size_t>(phases - 1)].next, model_.head.lm_head.num_panels(), present,
                  [&](int64_t begin, int64_t end) { table.project_logits(model_, step, begin, end); });
        }
    });
}

void Decoder::logits(int64_t batch, const float* hidden_BLD, float* logits_BV, int threads) {
    const std::lock_guard<std::mutex> lock(busy_);
    if (batch < 1) return;
    DecodeStep step;
    step.batch = batch;
    step.hidden_BLD = const_cast<float*>(hidden_BLD);
    step.hidden_stride = model_.sizes.n_layer * model_.sizes.d_model;
    step.logits_BV = logits_BV;
    reserve(step);
    const DecodeTable& table = decode_table();
    table.mix(model_, step);
    std::atomic<int64_t> next{0};
    parallel_team(worthwhile(batch, false, true, threads), [&](int, int present) {
        share(next, model_.head.lm_head.num_panels(), present,
              [&](int64_t begin, int64_t end) { table.project_logits(model_, step, begin, end); });
    });
}

}  // namespace crsm
