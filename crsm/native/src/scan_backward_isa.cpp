// The gradients of the scan, one sequence and one group of heads at a time, chunks from the last to the first.
//
// With M[t,s] = (C[t]·B[s])·exp(a[t] - a[s]), u = dt·x, e and l the decays into and out of the chunk and h its state:
//   y = M·u + e∘(C·hᵀ) + D·x      h' = e[Q]·h + (l∘u)ᵀ·B
//   du = Mᵀ·dy + l∘(B·dh'ᵀ)       dM = dy·uᵀ       dh = e[Q]·dh' + (e∘dy)ᵀ·C
//   dC = dS·B + (e∘dy)·h          dB = dSᵀ·C + (l∘u)·dh'       dS = Σ_heads dM∘exp(a[t] - a[s])
// The gradient of a token's decay is what flows over it, from tokens before it to tokens after it; the diagonal of dM∘M
// is left out of the sums, not subtracted, so that strong decays do not end in a difference of large numbers.
#include "scan_tile.hpp"

namespace crsm::CRSM_ISA {
namespace {

template <typename T>
inline T dot(const T* a, const T* b, int64_t width) {
    Vec<T> sum{};
    for (int64_t i = 0; i < width; i += kLanes<T>) sum += load(a + i) * load(b + i);
    return sum_lanes<T>(sum);
}

template <typename T>
void scale_rows(int64_t rows, int64_t width, const T* in, const T* scale, T* out) {
    for (int64_t r = 0; r < rows; ++r) {
        const Vec<T> factor = broadcast(scale[r]);
        for (int64_t i = 0; i < width; i += kLanes<T>) store(out + r * width + i, factor * load(in + r * width + i));
    }
}

// Scratch of one head in one chunk.
template <typename T>
struct Work {
    T *u_QP, *u_PQ, *dy_QP, *du_QP, *scaled_QP, *moved_QN;
    T *mixed_QQ, *dscores_QQ, *dmixed_RQ;
    T *state_NP, *state_PN, *dstate_PN;
    T *db_QN, *dc_QN;
    T *dlog_Q, *column_Q, *left_Q;
};

// M of the whole chunk, the gradient of the scores, and into dlog_Q what flows within the chunk over each decay.
template <typename T>
void inside(const Scan<T>& scan, const Chunk<T>& chunk, const HeadDecay<T>& decay, const Work<T>& w) {
    const int64_t length = chunk.length, P = scan.size_P, Qp = padded(scan.size_Q), Pp = padded(P);
    for (int64_t s = 0; s < Qp; ++s) w.column_Q[s] = 0;
    for (int64_t t0 = 0; t0 < length; t0 += kTriangleRows) {
        const int64_t rows = smaller(kTriangleRows, length - t0), reach = t0 + rows;
        multiply<T>(rows, padded(reach), P, w.dy_QP + t0 * Pp, Pp, 1, w.u_PQ, Qp, w.dmixed_RQ, Qp, false);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t t = t0 + r;
            T* dmixed = w.dmixed_RQ + r * Qp;
            const T own = dmixed[t];
            dmixed[t] = 0;
            Vec<T> row_sum{};
            for (int64_t s = 0; s < reach; s += kLanes<T>) {
                const Vec<T> between = decay_between(chunk, decay, Qp, t, s, scan.segment != nullptr);
                const Vec<T> scores = load(chunk.scores_QQ + t * Qp + s);
                const Vec<T> dscores = load(dmixed + s) * between;
                const Vec<T> flow = dscores * scores;
                store(w.mixed_QQ + t * Qp + s, scores * between);
                store(w.dscores_QQ + t * Qp + s, load(w.dscores_QQ + t * Qp + s) + dscores);
                store(w.column_Q + s, load(w.column_Q + s) + flow);
                row_sum += flow;
            }
            w.dscores_QQ[t * Qp + t] += own;
            w.dlog_Q[t] = sum_lanes<T>(row_sum);
        }
    }
    for (int64_t t = 0; t < length; ++t) w.dlog_Q[t] -= w.column_Q[t];
    // du = Mᵀ·dy: columns of M are zero above the diagonal.
    for (int64_t s = 0; s < length; s += kTriangleRows) {
        multiply<T>(smaller(kTriangleRows, length - s), Pp, length - s, w.mixed_QQ + s * Qp + s, 1, Qp,
                    w.dy_QP + s * Pp, Pp, w.du_QP + s * Pp, Pp, false);
    }
}

}  // namespace

template <typename T>
int64_t scan_backward_scratch(const Scan<T>& scan) {
    const int64_t Q = scan.size_Q, N = scan.size_N, P = scan.size_P;
    const int64_t Qp = padded(Q), Np = padded(N), Pp = padded(P), heads = scan.size_H / scan.groups_G + 1;
    return chunk_scratch(Qp, Np, Q, N) + heads * N * Pp + 4 * Q * Pp + P * Qp + 3 * Q * Np + 2 * Q * Qp +
           kTriangleRows * Qp + N * Pp + 2 * P * Np + 3 * Qp + 32 * kPad;
}

template <typename T>
void scan_backward(const Scan<T>& scan, int64_t b, int64_t group, T* scratch) {
    const int64_t Q = scan.size_Q, N = scan.size_N, P = scan.size_P, H = scan.size_H;
    const int64_t Qp = padded(Q), Np = padded(N), Pp = padded(P);
    const int64_t head_begin = first_head(H, scan.groups_G, group), head_end = first_head(H, scan.groups_G, group + 1);
    Chunk<T> chunk;
    HeadDecay<T> decay;
    take_chunk(scan, scratch, chunk, decay);
    T* dstates = take(scratch, (head_end - head_begin) * N * Pp);
    Work<T> w;
    w.u_QP = take(scratch, Q * Pp);
    w.dy_QP = take(scratch, Q * Pp);
    w.du_QP = take(scratch, Q * Pp);
    w.scaled_QP = take(scratch, Q * Pp);
    w.moved_QN = take(scratch, Q * Np);
    w.db_QN = take(scratch, Q * Np);
    w.dc_QN = take(scratch, Q * Np);
    w.mixed_QQ = take(scratch, Q * Qp);
    w.dscores_QQ = take(scratch, Q * Qp);
    w.dlog_Q = take(scratch, Qp);
    w.column_Q = take(scratch, Qp);
    w.left_Q = take(scratch, Qp);
    w.u_PQ = take(scratch, P * Qp);
    w.dmixed_RQ = take(scratch, kTriangleRows * Qp);
    w.state_NP = take(scratch, N * Pp);
    w.state_PN = take(scratch, P * Np);
    w.dstate_PN = take(scratch, P * Np);

    for (int64_t h = head_begin; h < head_end; ++h) {
        load_state<T>(scan.dlast == nullptr ? nullptr : scan.dlast + (b * H + h) * P * N, P, N,
                      dstates + (h - head_begin) * N * Pp);
        scan.dA_BH[b * H + h] = 0;
        if (scan.dD_BH != nullptr) scan.dD_BH[b * H + h] = 0;
        if (scan.dbias_BH != nullptr) scan.dbias_BH[b * H + h] = 0;
    }
    for (int64_t index = scan.chunks_S; index-- > 0;) {
        load_chunk(scan, b, index, chunk);
        const int64_t length = chunk.length;
        const bool has_gradient = index + 1 < scan.chunks_S || scan.dlast != nullptr;  // of the state after the chunk
        const bool wants_gradient = index > 0 || scan.dstate != nullptr;               // of the state before it
        fill_zero(w.dscores_QQ, length * Qp);
        fill_zero(w.db_QN, length * Np);
        fill_zero(w.dc_QN, length * Np);
        for (int64_t h = head_begin; h < head_end; ++h) {
            T* dstate_NP = dstates + (h - head_begin) * N * Pp;
            load_decay(scan, chunk, b, h, decay);
            const T* x = scan.x.data + b * scan.x.batch + chunk.start * scan.x.row + h * P;
            const T* dy = scan.dy.data + b * scan.dy.batch + chunk.start * scan.dy.row + h * P;
            copy_rows<T>(length, P, x, scan.x.row, decay.dt_Q, w.u_QP);
            copy_rows<T>(length, P, dy, scan.dy.row, nullptr, w.dy_QP);
            transpose<T>(length, P, w.u_QP, Pp, w.u_PQ, Qp, true);
            inside(scan, chunk, decay, w);

            bool has_state = index > 0;
            if (index > 0) {
                copy_rows<T>(N, P, scan.kept + ((b * H + h) * scan.chunks_S + index) * N * P, P, nullptr, w.state_NP);
            } else if (scan.state != nullptr) {
                has_state = load_state<T>(scan.state + (b * H + h) * P * N, P, N, w.state_NP);
            }
            T over_chunk = 0;  // what flows from the state before the chunk to the one after it
            for (int64_t t = 0; t < length; ++t) w.left_Q[t] = 0;
            if (has_gradient) {
                multiply<T>(length, Pp, N, chunk.b_QN, Np, 1, dstate_NP, Pp, w.scaled_QP, Pp, false);
                for (int64_t t = 0; t < length; ++t) {
                    const Vec<T> leave = broadcast(decay.leave_Q[t]);
                    Vec<T> sum{};
                    for (int64_t p = 0; p < Pp; p += kLanes<T>) {
                        const Vec<T> part = leave * load(w.scaled_QP + t * Pp + p);
                        const Vec<T> u = load(w.u_QP + t * Pp + p);
                        store(w.du_QP + t * Pp + p, load(w.du_QP + t * Pp + p) + part);
                        store(w.scaled_QP + t * Pp + p, leave * u);
                        sum += part * u;
                    }
                    w.left_Q[t] = sum_lanes<T>(sum);
                }
                transpose<T>(N, P, dstate_NP, Pp, w.dstate_PN, Np, true);
                multiply<T>(length, Np, P, w.scaled_QP, Pp, 1, w.dstate_PN, Np, w.db_QN, Np, true);
                if (has_state) over_chunk = decay.whole * dot(dstate_NP, w.state_NP, N * Pp);
            }
            if (has_state || wants_gradient) scale_rows(length, Pp, w.dy_QP, decay.enter_Q, w.scaled_QP);
            if (has_state) {
                transpose<T>(N, P, w.state_NP, Pp, w.state_PN, Np, true);
                multiply<T>(length, Np, P, w.scaled_QP, Pp, 1, w.state_PN, Np, w.moved_QN, Np, false);
                for (int64_t t = 0; t < length; ++t) {
                    w.dlog_Q[t] += dot(chunk.c_QN + t * Np, w.moved_QN + t * Np, Np);
                    for (int64_t n = 0; n < Np; n += kLanes<T>) {
                        store(w.dc_QN + t * Np + n, load(w.dc_QN + t * Np + n) + load(w.moved_QN + t * Np + n));
                    }
                }
            }
            if (wants_gradient) {
                const Vec<T> whole = broadcast(decay.whole);
                for (int64_t i = 0; i < N * Pp; i += kLanes<T>) store(dstate_NP + i, whole * load(dstate_NP + i));
                multiply<T>(N, Pp, length, chunk.c_QN, 1, Np, w.scaled_QP, Pp, dstate_NP, Pp, true);
            }
            // Over the decay of t flows what comes to tokens from t on, and what left before it.
            for (int64_t t = length; t-- > 1;) w.dlog_Q[t - 1] += w.dlog_Q[t];
            T left = over_chunk;
            for (int64_t t = 0; t < length; ++t) {
                w.dlog_Q[t] += left;
                left += w.left_Q[t];
            }
            const T A = scan.A_H[h];
            const Vec<T> skip = broadcast(scan.D_H != nullptr ? scan.D_H[h] : T(0));
            T dA = 0;
            Vec<T> dD{};
            T* dx = scan.dx.data + b * scan.dx.batch + chunk.start * scan.dx.row + h * P;
            for (int64_t t = 0; t < length; ++t) {
                const Vec<T> dt = broadcast(decay.dt_Q[t]);
                Vec<T> sum{};
                for (int64_t p = 0; p < P; p += kLanes<T>) {
                    const Vec<T> du = load(w.du_QP + t * Pp + p), dy_v = load(w.dy_QP + t * Pp + p);
                    const Vec<T> x_v = load_some(x + t * scan.x.row + p, P - p);
                    sum += x_v * du;
                    dD += x_v * dy_v;
                    store_some(dx + t * scan.dx.row + p, dt * du + skip * dy_v, P - p);
                }
                dA += decay.dt_Q[t] * w.dlog_Q[t];
                w.dlog_Q[t] = sum_lanes<T>(sum) + A * w.dlog_Q[t];
            }
            scan.dA_BH[b * H + h] += dA;
            if (scan.dD_BH != nullptr) scan.dD_BH[b * H + h] += sum_lanes<T>(dD);
            T* ddt = scan.ddt.data + b * scan.ddt.batch + chunk.start * scan.ddt.row + h;
            if (scan.dt_bias_H != nullptr) {
                // The derivative of softplus, out of its value: 1 - exp(-dt).
                T sum = 0;
                for (int64_t t = 0; t < length; t += kLanes<T>) {
                    const T* raw = scan.dt.data + b * scan.dt.batch + (chunk.start + t) * scan.dt.row + h;
                    Vec<T> before{};
                    for (int64_t i = 0; i < kLanes<T> && t + i < length; ++i) before[i] = raw[i * scan.dt.row];
                    const Vec<T> slope = sigmoid(before + scan.dt_bias_H[h]);
                    store(w.dlog_Q + t, slope * load(w.dlog_Q + t));
                }
                for (int64_t t = 0; t < length; ++t) sum += w.dlog_Q[t];
                scan.dbias_BH[b * H + h] += sum;
            }
            for (int64_t t = 0; t < length; ++t) ddt[t * scan.ddt.row] = w.dlog_Q[t];
            if (index == 0 && scan.dstate != nullptr) {
                transpose<T>(N, P, dstate_NP, Pp, scan.dstate + (b * H + h) * P * N, N, false);
            }
        }
        for (int64_t t = 0; t < length; t += kTriangleRows) {
            const int64_t rows = smaller(kTriangleRows, length - t);
            multiply<T>(rows, Np, t + rows, w.dscores_QQ + t * Qp, Qp, 1, chunk.b_QN, Np, w.dc_QN + t * Np, Np, true);
            multiply<T>(rows, Np, length - t, w.dscores_QQ + t * Qp + t, 1, Qp, chunk.c_QN + t * Np, Np,
                        w.db_QN + t * Np, Np, true);
        }
        T* db = scan.db.data + group * scan.group_stride + b * scan.db.batch + chunk.start * scan.db.row;
        T* dc = scan.dc.data + group * scan.group_stride + b * scan.dc.batch + chunk.start * scan.dc.row;
        for (int64_t t = 0; t < length; ++t) {
            for (int64_t n = 0; n < N; n += kLanes<T>) {
                store_some(db + t * scan.db.row + n, load(w.db_QN + t * Np + n), N - n);
                store_some(dc + t * scan.dc.row + n, load(w.dc_QN + t * Np + n), N - n);
            }
        }
    }
}

template int64_t scan_backward_scratch<float>(const Scan<float>&);
template int64_t scan_backward_scratch<double>(const Scan<double>&);
template void scan_backward<float>(const Scan<float>&, int64_t, int64_t, float*);
template void scan_backward<double>(const Scan<double>&, int64_t, int64_t, double*);

}  // namespace crsm::CRSM_ISA
