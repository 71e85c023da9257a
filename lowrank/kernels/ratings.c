/* One half step of alternating least squares over sparse rows, in fp32: for every row with observations (j, v_j) minimise

       sum_j (t_j - b - x z_j)^2 + ridge |x|^2 + bias_ridge b^2,   t_j = v_j - mean - c_j,

   over x and b, where z_j and c_j are factor and bias of the other side. Factor rows are padded with zeros to a multiple
   of LANES floats. */

#include <float.h>
#include <math.h>
#include <string.h>

#include "threads.h"

#define LANES 8
#define CHUNK 64
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

/* g[i.., j..] += sign * sum_p a[p, i..]^T a[p, j..] for one tile of g. */
static inline void tile(const float *a, int64_t depth, int64_t ld, int64_t i, int64_t j, float *g, int64_t gld,
                        float sign) {
    vec sum[LANES] = {0};
    for (int64_t p = 0; p < depth; p++) {
        const float *row = a + p * ld;
        const vec right = *(const vec *)(row + j);
#pragma GCC unroll 8
        for (int u = 0; u < LANES; u++) sum[u] += row[i + u] * right;
    }
#pragma GCC unroll 8
    for (int u = 0; u < LANES; u++) *(vec *)(g + (i + u) * gld + j) += sign * sum[u];
}

/* The upper tiles of g (ld x ld) += a^T a, a (depth x ld). */
static void add_gram(const float *a, int64_t depth, int64_t ld, float *g) {
    for (int64_t i = 0; i < ld; i += LANES)
        for (int64_t j = i; j < ld; j += LANES) tile(a, depth, ld, i, j, g, ld, 1.0f);
}

/* a = U^T U in place of the upper triangle, ld a multiple of LANES; 0 when a is not positive definite. */
static int factor_f32(float *a, int64_t ld) {
    for (int64_t top = 0; top < ld; top += LANES) {
        for (int64_t j = top; top > 0 && j < ld; j += LANES) tile(a, top, ld, top, j, a, ld, -1.0f);
        for (int64_t i = top; i < top + LANES; i++) {
            float *row = a + i * ld;
            for (int64_t p = top; p < i; p++) {
                const float f = a[p * ld + i];
                for (int64_t c = top; c < ld; c += LANES) *(vec *)(row + c) -= f * *(vec *)(a + p * ld + c);
            }
            if (!(row[i] > 0)) return 0;
            const float inverse = 1.0f / sqrtf(row[i]);
            for (int64_t c = top; c < ld; c += LANES) *(vec *)(row + c) *= inverse;
        }
    }
    return 1;
}

static inline float total(vec v) {
    float sum = 0;
    for (int u = 0; u < LANES; u++) sum += v[u];
    return sum;
}

static inline float dot(const float *a, const float *b, int64_t ld) {
    vec sum = {0};
    for (int64_t c = 0; c < ld; c += LANES) sum += *(const vec *)(a + c) * *(const vec *)(b + c);
    return total(sum);
}

static inline void add(float *y, float f, const float *x, int64_t ld) {
    for (int64_t c = 0; c < ld; c += LANES) *(vec *)(y + c) += f * *(const vec *)(x + c);
}

/* Four rows at a time: four chains of additions instead of one. */
static inline void dot4(const float *const rows[4], const float *x, int64_t ld, float out[4]) {
    vec a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t k = 0; k < ld; k += LANES) {
        const vec right = *(const vec *)(x + k);
        a += *(const vec *)(rows[0] + k) * right;
        b += *(const vec *)(rows[1] + k) * right;
        c += *(const vec *)(rows[2] + k) * right;
        d += *(const vec *)(rows[3] + k) * right;
    }
    out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
}

static inline void add4(float *y, const float f[4], const float *const rows[4], int64_t ld) {
    for (int64_t k = 0; k < ld; k += LANES)
        *(vec *)(y + k) += (f[0] * *(const vec *)(rows[0] + k) + f[1] * *(const vec *)(rows[1] + k)) +
                           (f[2] * *(const vec *)(rows[2] + k) + f[3] * *(const vec *)(rows[3] + k));
}

static void back_f32(const float *u, int64_t ld, float *x) {
    for (int64_t p = 0; p < ld; p++) {
        const float *row = u + p * ld;
        const float f = x[p] / row[p];
        for (int64_t c = p + 1; c < ld; c++) x[c] -= f * row[c];
        x[p] = f;
    }
    for (int64_t p = ld - 1; p >= 0; p--) {
        const float *row = u + p * ld;
        float sum = 0;
        for (int64_t c = p + 1; c < ld; c++) sum += row[c] * x[c];
        x[p] = (x[p] - sum) / row[p];
    }
}

typedef struct {
    const float *z;    /* (columns, ld) factors of the other side */
    int64_t rank, ld;
    int bias;          /* whether rows have a bias */
    float *target;     /* (2 * max degree) t, later residuals; and room for products */
    float *rows;       /* gathered z: (max(CHUNK, ld), ld) */
    float *gram;       /* (ld, ld) */
    float *factor;     /* (ld, ld) */
    float *vectors;    /* 4 of ld */
} Work;

/* Pointers to the z of four entries. */
#define AT(p) w->z + index[p] * w->ld
#define FOUR(p) {AT(p), AT(p + 1), AT(p + 2), AT(p + 3)}

/* y = Z x for the entries of a row and, where `image` is given, image += Z^T y; returns the sum of y. */
static double product(const Work *w, const int32_t *index, int64_t degree, const float *x, float *y, float *image) {
    double sum = 0;
    int64_t p = 0;
    for (; p + 4 <= degree; p += 4) {
        const float *const rows[4] = FOUR(p);
        dot4(rows, x, w->ld, y + p);
        if (image) add4(image, y + p, rows, w->ld);
        sum += (y[p] + y[p + 1]) + (y[p + 2] + y[p + 3]);
    }
    for (; p < degree; p++) {
        y[p] = dot(w->z + index[p] * w->ld, x, w->ld);
        if (image) add(image, y[p], w->z + index[p] * w->ld, w->ld);
        sum += y[p];
    }
    return sum;
}

/* The sum of squared errors of x and b. */
static double squares(const Work *w, const int32_t *index, int64_t degree, const float *x, float b) {
    double loss = 0;
    float *y = w->target + degree;
    product(w, index, degree, x, y, NULL);
    for (int64_t p = 0; p < degree; p++) {
        const double e = (double)w->target[p] - b - y[p];
        loss += e * e;
    }
    return loss;
}

/* Degree below the rank: x = Z^T a, b = q sum(a) with (Z Z^T + q 1 1^T + ridge I) a = t, q = ridge / bias_ridge. */
static int solve_dual(const Work *w, const int32_t *index, int64_t degree, float ridge, float bias_ridge, float *x,
                      float *b) {
    const int64_t ld = w->ld, dld = (degree + LANES - 1) / LANES * LANES;
    const float constant = w->bias ? ridge / bias_ridge : 0.0f;
    float *kernel = w->gram, *a = w->vectors;
    for (int64_t p = 0; p < degree; p++) memcpy(w->rows + p * ld, w->z + index[p] * ld, ld * sizeof(float));
    memset(kernel, 0, dld * dld * sizeof(float));
    for (int64_t p = 0; p < degree; p++)
        for (int64_t q = p; q < degree; q++)
            kernel[p * dld + q] = constant + dot(w->rows + p * ld, w->rows + q * ld, ld);
    for (int64_t p = 0; p < degree; p++) kernel[p * dld + p] += ridge;
    for (int64_t p = degree; p < dld; p++) kernel[p * dld + p] = 1.0f;
    if (!factor_f32(kernel, dld)) return 0;
    memset(a, 0, dld * sizeof(float));
    memcpy(a, w->target, degree * sizeof(float));
    back_f32(kernel, dld, a);
    memset(x, 0, ld * sizeof(float));
    double sum = 0;
    for (int64_t p = 0; p < degree; p++) {
        add(x, a[p], w->rows + p * ld, ld);
        sum += a[p];
    }
    *b = w->bias ? (float)(constant * sum) : 0.0f;
    return 1;
}

/* One proximal Newton step from x, the bias eliminated: exact where the normal matrix has full rank. */
static void solve_primal(const Work *w, const int32_t *index, int64_t degree, float ridge, float share, float *x,
                         float *b) {
    const int64_t ld = w->ld;
    float *right = w->vectors, *sum = right + ld;
    double slope = 0, trace = 0;
    memset(w->gram, 0, ld * ld * sizeof(float));
    memset(right, 0, 2 * ld * sizeof(float));
    for (int64_t low = 0; low < degree; low += CHUNK) {
        const int64_t count = degree - low < CHUNK ? degree - low : CHUNK;
        for (int64_t p = 0; p < count; p++) {
            float *row = w->rows + p * ld;
            memcpy(row, w->z + index[low + p] * ld, ld * sizeof(float));
            const float e = w->target[low + p] - dot(row, x, ld);
            add(right, e, row, ld);
            add(sum, 1.0f, row, ld);
            slope += e;
        }
        add_gram(w->rows, count, ld, w->gram);
    }
    for (int64_t p = 0; p < ld; p++) trace += w->gram[p * ld + p];
    add(right, (float)(-share * slope), sum, ld);
    add(right, -ridge, x, ld);
    for (int64_t p = 0; p < ld && share > 0; p++)
        add(w->gram + p * ld + p / LANES * LANES, -share * sum[p], sum + p / LANES * LANES, ld - p / LANES * LANES);
    const float rounding = fmaxf((float)(4 * (double)FLT_EPSILON * trace), FLT_MIN);
    float damping = fmaxf(rounding - ridge, 0);
    for (int attempt = 0;;) {
        memcpy(w->factor, w->gram, ld * ld * sizeof(float));
        for (int64_t p = 0; p < ld; p++) w->factor[p * ld + p] += p < w->rank ? ridge + damping : 1.0f;
        damping = 10 * fmaxf(damping, rounding);
        if (factor_f32(w->factor, ld)) break;
        if (++attempt == ATTEMPTS) return;
    }
    back_f32(w->factor, ld, right);
    add(x, 1.0f, right, ld);
    *b = (float)(share * (slope - dot(sum, right, ld)));
}

/* `steps` of conjugate gradients from x, the bias eliminated; leaves residuals in target, returns their squares. */
static double solve_cg(const Work *w, const int32_t *index, int64_t degree, float ridge, float share, int steps,
                       float *x, float *b) {
    const int64_t ld = w->ld;
    float *left = w->vectors, *way = left + ld, *image = way + ld, *sum = image + ld, *e = w->target, *y = e + degree;
    double slope = 0, loss = 0;
    memset(w->vectors, 0, 4 * ld * sizeof(float));
    product(w, index, degree, x, y, NULL);
    for (int64_t p = 0; p < degree; p++) {
        e[p] -= y[p];
        add(left, e[p], w->z + index[p] * ld, ld);
        add(sum, 1.0f, w->z + index[p] * ld, ld);
        slope += e[p];
    }
    add(left, (float)(-share * slope), sum, ld);
    add(left, -ridge, x, ld);
    memcpy(way, left, ld * sizeof(float));
    double norm = dot(left, left, ld);
    for (int step = 0; step < steps && norm > 1e-20; step++) {
        memset(image, 0, ld * sizeof(float));
        const double images = product(w, index, degree, way, y, image);
        add(image, (float)(-share * images), sum, ld);
        add(image, ridge, way, ld);
        const double curvature = dot(way, image, ld);
        if (!(curvature > 0)) break;
        const float length = (float)(norm / curvature);
        add(x, length, way, ld);
        add(left, -length, image, ld);
        for (int64_t p = 0; p < degree; p++) e[p] -= length * y[p];
        slope -= length * images;
        const double next = dot(left, left, ld);
        const float ratio = (float)(next / norm);
        for (int64_t c = 0; c < ld; c++) way[c] = left[c] + ratio * way[c];
        norm = next;
    }
    *b = (float)(share * slope);
    for (int64_t p = 0; p < degree; p++) loss += ((double)e[p] - *b) * ((double)e[p] - *b);
    return loss;
}

/* The cheapest way through one row that is exact, or `steps` of conjugate gradients where that is cheaper still. */
static double solve_row(const Work *w, const int32_t *index, int64_t degree, float ridge, float bias_ridge, int steps,
                        float *x, float *b) {
    const int dual = ridge > 0 && (!w->bias || bias_ridge > 0) && 2 * degree <= w->rank;
    if (dual && (steps == 0 || degree <= 4 * (steps + 1)) && solve_dual(w, index, degree, ridge, bias_ridge, x, b))
        return squares(w, index, degree, x, *b);
    const float share = w->bias ? 1.0f / ((float)degree + bias_ridge) : 0.0f;
    if (steps > 0) return solve_cg(w, index, degree, ridge, share, steps, x, b);
    solve_primal(w, index, degree, ridge, share, x, b);
    return squares(w, index, degree, x, *b);
}

typedef struct {
    int64_t rank, ld, widest;
    const int64_t *start, *order;
    const int32_t *index;
    const float *value, *z, *c;
    float mean;
    double ridge, bias_ridge;
    int per_entry, bias, steps;
    float *x, *b;
    double *loss;
} Ratings;

static void ratings_rows(Job *job) {
    const Ratings *q = job->data;
    const int64_t ld = q->ld, gathered = ld > CHUNK ? ld : CHUNK;
    float *memory = aligned_alloc(64, ((gathered * ld + 2 * ld * ld + 4 * ld + 2 * q->widest) * 4 + 127) / 64 * 64);
    if (!memory) return;
    Work w = {q->z, q->rank, ld, q->bias, 0, memory, 0, 0, 0};
    w.gram = w.rows + gathered * ld;
    w.factor = w.gram + ld * ld;
    w.vectors = w.factor + ld * ld;
    w.target = w.vectors + 4 * ld;
    for (int64_t n, end; take(job, &n, &end);)
        for (; n < end; n++) {
            const int64_t i = q->order[n], low = q->start[i], degree = q->start[i + 1] - low;
            if (degree == 0) {
                memset(q->x + i * ld, 0, ld * sizeof(float));
                q->b[i] = 0;
                q->loss[i] = 0;
                continue;
            }
            const int32_t *index = q->index + low;
            for (int64_t p = 0; p < degree; p++) w.target[p] = q->value[low + p] - q->mean - q->c[index[p]];
            const double scale = q->per_entry ? (double)degree : 1.0;
            q->loss[i] = solve_row(&w, index, degree, (float)(scale * q->ridge), (float)(scale * q->bias_ridge),
                                   q->steps, q->x + i * ld, q->b + i);
        }
    free(memory);
}

int solve_ratings(int64_t rows, int64_t rank, int64_t ld, const int64_t *start, const int32_t *index,
                  const float *value, const int64_t *order, float mean, const float *z, const float *c, double ridge,
                  double bias_ridge, int per_entry, int bias, int steps, float *x, float *b, double *loss,
                  int threads) {
    Ratings ratings = {rank, ld, 1, start, order, index, value, z, c, mean, ridge, bias_ridge, per_entry, bias, steps,
                       x, b, loss};
    for (int64_t i = 0; i < rows; i++)
        if (start[i + 1] - start[i] > ratings.widest) ratings.widest = start[i + 1] - start[i];
    Job job = {rows, 0, ratings_rows, &ratings};
    return run(&job, threads);
}
