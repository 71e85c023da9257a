/* The threads of a process that help with jobs. After a job they look out for the next one for a fraction of a
   millisecond, for the calls of a model's pass follow each other closely and waking a thread takes as long as many of
   them, and then sleep. Who calls works too and never waits for a helper that has not begun, so that a busy machine costs
   no more than the help. A second caller at the same time has no helpers. After fork() the child starts its own. */

#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#define MOST_HELPERS 255
/* Looks at an empty board before a helper sleeps, and a caller lets others run: some 0.3 ms. */
#define PATIENCE 10000

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

static pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER; /* held by the one whose job is on the board */
static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;     /* guards `asleep` */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int hired;

/* Of every helper: how often it was called, its bell, and whether it must be rung. */
static _Atomic uint64_t calls[MOST_HELPERS];
static pthread_cond_t bells[MOST_HELPERS];
static int asleep[MOST_HELPERS];

/* The board: the job, how many helpers may still enter, and how many have left. */
static Job *_Atomic board;
static _Atomic int places, left;

static void begin(void) {
    pthread_mutex_init(&callers, NULL);
    pthread_mutex_init(&bed, NULL);
    for (int i = 0; i < MOST_HELPERS; i++) {
        pthread_cond_init(bells + i, NULL);
        asleep[i] = 0;
    }
    hired = 0;
    atomic_store(&places, 0);
}

static void begin_once(void) {
    begin();
    pthread_atfork(NULL, NULL, begin);
}

static void await_call(int own, uint64_t heard) {
    for (int i = 0; i < PATIENCE; i++) {
        if (atomic_load(calls + own) != heard) return;
        PAUSE();
    }
    pthread_mutex_lock(&bed);
    asleep[own] = 1;
    while (atomic_load(calls + own) == heard) pthread_cond_wait(bells + own, &bed);
    asleep[own] = 0;
    pthread_mutex_unlock(&bed);
}

static void *help(void *number) {
    const int own = (int)(intptr_t)number;
    for (uint64_t heard = 0;;) {
        await_call(own, heard);
        heard = atomic_load(calls + own);
        int free = atomic_load(&places);
        while (free > 0 && !atomic_compare_exchange_weak(&places, &free, free - 1)) {}
        if (free <= 0) continue;
        Job *job = atomic_load(&board);
        job->work(job);
        atomic_fetch_add(&left, 1);
    }
    return NULL;
}

/* Have so many helpers, or as many as the system gives. Signals are for the threads of whoever loaded us, but for those
   that tell of a fault of this one. */
static int hire(int wanted) {
    static const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
    sigset_t others, before;
    sigfillset(&others);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) sigdelset(&others, own[i]);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    for (; hired < wanted; hired++) {
        pthread_t id;
        atomic_store(calls + hired, 0);
        if (pthread_create(&id, NULL, help, (void *)(intptr_t)hired) != 0) break;
        pthread_detach(id);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return hired < wanted ? hired : wanted;
}

int run(Job *job, int threads) {
    const int64_t useful = (job->rows + GRAIN - 1) / GRAIN - 1;
    int64_t wanted = threads - 1 < useful ? threads - 1 : useful;
    if (wanted > MOST_HELPERS) wanted = MOST_HELPERS;
    pthread_once(&once, begin_once);
    if (wanted < 1 || pthread_mutex_trylock(&callers) != 0) {
        job->work(job);
        return atomic_load(&job->next) < job->rows;
    }
    const int called = hired < wanted ? hire((int)wanted) : (int)wanted;
    atomic_store(&board, job);
    atomic_store(&left, 0);
    atomic_store(&places, called);
    for (int i = 0; i < called; i++) atomic_fetch_add(calls + i, 1);
    pthread_mutex_lock(&bed);
    for (int i = 0; i < called; i++)
        if (asleep[i]) pthread_cond_signal(bells + i);
    pthread_mutex_unlock(&bed);
    job->work(job);
    const int entered = called - atomic_exchange(&places, 0);
    for (int i = 0; atomic_load(&left) < entered; i++)
        if (i < PATIENCE) PAUSE();
        else sched_yield();
    pthread_mutex_unlock(&callers);
    return atomic_load(&job->next) < job->rows;
}
