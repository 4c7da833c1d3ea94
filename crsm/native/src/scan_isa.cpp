// The forward pass of the scan, one sequence and one group of heads at a time.
#include "scan_tile.hpp"

namespace crsm::CRSM_ISA {

template <typename T>
int64_t scan_backward_scratch(const Scan<T>& scan);
template <typename T>
void scan_backward(const Scan<T>& scan, int64_t b, int64_t group, T* scratch);
extern template int64_t scan_backward_scratch<float>(const Scan<float>&);
extern template int64_t scan_backward_scratch<double>(const Scan<double>&);
extern template void scan_backward<float>(const Scan<float>&, int64_t, int64_t, float*);
extern template void scan_backward<double>(const Scan<double>&, int64_t, int64_t, double*);

namespace {

template <typename T>
int64_t forward_scratch(const Scan<T>& scan) {
    const int64_t Q = scan.size_Q, N = scan.size_N, Qp = padded(Q), Np = padded(N), Pp = padded(scan.size_P);
    const int64_t heads = scan.size_H / scan.groups_G + 1;
    return chunk_scratch(Qp, Np, Q, N) + heads * N * Pp + Q * Pp + kTriangleRows * (Qp + 2 * Pp) + kPad * 8;
}

template <typename T>
void forward(const Scan<T>& scan, int64_t b, int64_t group, T* scratch) {
    const int64_t Q = scan.size_Q, N = scan.size_N, P = scan.size_P, H = scan.size_H;
    const int64_t Qp = padded(Q), Np = padded(N), Pp = padded(P);
    const int64_t head_begin = first_head(H, scan.groups_G, group), head_end = first_head(H, scan.groups_G, group + 1);
    Chunk<T> chunk;
    HeadDecay<T> decay;
    take_chunk(scan, scratch, chunk, decay);
    T* states = take(scratch, (head_end - head_begin) * N * Pp);
    T* dtx_QP = take(scratch, Q * Pp);
    T* mixed_RQ = take(scratch, kTriangleRows * Qp);
    T* y_RP = take(scratch, kTriangleRows * Pp);
    T* before_RP = take(scratch, kTriangleRows * Pp);

    for (int64_t index = 0; index < scan.chunks_S; ++index) {
        load_chunk(scan, b, index, chunk);
        const int64_t length = chunk.length;
        for (int64_t h = head_begin; h < head_end; ++h) {
            T* state_NP = states + (h - head_begin) * N * Pp;
            bool empty = false;
            if (index == 0) {
                empty = !load_state<T>(scan.state == nullptr ? nullptr : scan.state + (b * H + h) * P * N, P, N, state_NP);
            }
            if (scan.kept != nullptr) {
                T* kept = scan.kept + ((b * H + h) * scan.chunks_S + index) * N * P;
                for (int64_t n = 0; n < N; ++n) {
                    for (int64_t p = 0; p < P; p += kLanes<T>) {
                        store_some(kept + n * P + p, load(state_NP + n * Pp + p), P - p);
                    }
                }
            }
            load_decay(scan, chunk, b, h, decay);
            const T* x = scan.x.data + b * scan.x.batch + chunk.start * scan.x.row + h * P;
            T* y = scan.y.data + b * scan.y.batch + chunk.start * scan.y.row + h * P;
            copy_rows<T>(length, P, x, scan.x.row, decay.dt_Q, dtx_QP);
            const Vec<T> skip = broadcast(scan.D_H != nullptr ? scan.D_H[h] : T(0));
            for (int64_t t0 = 0; t0 < length; t0 += kTriangleRows) {
                const int64_t rows = smaller(kTriangleRows, length - t0), reach = t0 + rows;
                for (int64_t r = 0; r < rows; ++r) {
                    const T* scores = chunk.scores_QQ + (t0 + r) * Qp;
                    for (int64_t s = 0; s < reach; s += kLanes<T>) {
                        store(mixed_RQ + r * Qp + s, load(scores + s) * decay_between(chunk, decay, Qp, t0 + r, s,
                                                                                      scan.segment != nullptr));
                    }
                }
                multiply<T>(rows, Pp, reach, mixed_RQ, Qp, 1, dtx_QP, Pp, y_RP, Pp, false);
                if (!empty) {
                    multiply<T>(rows, Pp, N, chunk.c_QN + t0 * Np, Np, 1, state_NP, Pp, before_RP, Pp, false);
                }
                for (int64_t r = 0; r < rows; ++r) {
                    const Vec<T> enter = broadcast(decay.enter_Q[t0 + r]);
                    for (int64_t p = 0; p < P; p += kLanes<T>) {
                        Vec<T> sum = load(y_RP + r * Pp + p);
                        if (!empty) sum += enter * load(before_RP + r * Pp + p);
                        if (scan.D_H != nullptr) sum += skip * load_some(x + (t0 + r) * scan.x.row + p, P - p);
                        store_some(y + (t0 + r) * scan.y.row + p, sum, P - p);
                    }
                }
            }
            for (int64_t t = 0; t < length; ++t) {
                const Vec<T> leave = broadcast(decay.leave_Q[t]);
                for (int64_t p = 0; p < Pp; p += kLanes<T>) {
                    store(dtx_QP + t * Pp + p, leave * load(dtx_QP + t * Pp + p));
                }
            }
            const Vec<T> whole = broadcast(decay.whole);
            for (int64_t i = 0; i < N * Pp && !empty; i += kLanes<T>) store(state_NP + i, whole * load(state_NP + i));
            multiply<T>(N, Pp, length, chunk.b_QN, 1, Np, dtx_QP, Pp, state_NP, Pp, true);
            if (index + 1 == scan.chunks_S) {
                transpose<T>(N, P, state_NP, Pp, scan.last + (b * H + h) * P * N, N, false);
            }
        }
    }
}

}  // namespace

extern const ScanTable scan_table = {
    {forward_scratch<float>, scan_backward_scratch<float>, forward<float>, scan_backward<float>},
    {forward_scratch<double>, scan_backward_scratch<double>, forward<double>, scan_backward<double>},
};

}  // namespace crsm::CRSM_ISA
