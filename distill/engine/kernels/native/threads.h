// The threads that kernels run on.
#pragma once

#include <algorithm>
#include <atomic>
#include <dlfcn.h>
#include <mutex>
#include <new>
#include <pthread.h>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

// Workers spin for a moment after each job, because the next one usually comes within microseconds, then sleep. The
// caller works too and waits only for workers that have begun: one that the system keeps off its core delays no job.
class Pool {
  public:
    template <class F> void run(int threads, int tasks, F&& body) {
        threads = std::min(threads, tasks);
        if (threads <= 1) {
            for (int task = 0; task < tasks; task++) body(task);
            if (leave) leave();
            return;
        }
        while (int(workers_.size()) < threads - 1) {
            const int index = int(workers_.size());
            workers_.emplace_back([this, index] { work(index); });
            workers_.back().detach();
        }
        body_ = [](void* f, int task) { (*static_cast<std::remove_reference_t<F>*>(f))(task); };
        context_ = &body;
        tasks_ = tasks;
        next_.store(0);
        helpers_.store(threads - 1); // opens the job
        jobs_.fetch_add(1);
        if (sleeping_.load()) jobs_.notify_all();
        take();
        helpers_.store(0);
        while (inside_.load()) pause();
    }

    // What each thread does when it has no task left of a job; null: nothing.
    void (*leave)() = nullptr;

    // A forked child has none of its parent's threads.
    void forget() {
        new (&workers_) std::vector<std::thread>();
        sleeping_.store(0);
        inside_.store(0);
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    void take() {
        for (int task; (task = next_.fetch_add(1)) < tasks_;) body_(context_, task);
        if (leave) leave();
    }
    void work(int index) {
        unsigned seen = 0;
        for (;;) {
            unsigned now;
            for (int spin = 0; (now = jobs_.load()) == seen && spin < 20000; spin++) pause();
            if (now == seen) {
                sleeping_.fetch_add(1);
                jobs_.wait(seen);
                sleeping_.fetch_sub(1);
                continue;
            }
            seen = now;
            inside_.fetch_add(1); // from here on the caller waits, if the job is still open
            if (index < helpers_.load()) take();
            inside_.fetch_sub(1);
        }
    }

    std::vector<std::thread> workers_;
    std::atomic<unsigned> jobs_{0};
    std::atomic<int> next_{0}, helpers_{0}, inside_{0}, sleeping_{0};
    int tasks_ = 0;
    void (*body_)(void*, int) = nullptr;
    void* context_ = nullptr;
};

Pool& pool() {
    static Pool* one = [] {
        static Pool* made = new Pool; // never destroyed: its workers outlive main's statics
        pthread_atfork(nullptr, nullptr, [] { made->forget(); });
        return made;
    }();
    return *one;
}
// Tasks on the threads of torch's own ops, for kernels that alternate with these: the idle threads of either side spin on
// the cores that the other one needs. The symbol is that of the OpenMP runtime that torch has loaded (GCC's, or LLVM's,
// which exports it too); the pool takes its place where there is none.
class Team {
  public:
    template <class F> void run(int threads, int tasks, F&& body) {
        if (threads <= 1 || tasks <= 1 || !parallel_) return pool().run(threads, tasks, body);
        struct Job {
            std::remove_reference_t<F>* body;
            int tasks;
            std::atomic<int> next{0};
        } job{&body, tasks};
        const auto take = [](void* given) {
            Job& job = *static_cast<Job*>(given);
            for (int task; (task = job.next.fetch_add(1)) < job.tasks;) (*job.body)(task);
        };
        parallel_(take, &job, unsigned(threads), 0); // as many as torch's ops: another number ends and starts threads
    }

  private:
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    const Parallel parallel_ = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
};

Team& team() {
    static Team one;
    return one;
}
std::mutex one_caller; // the pool and the scratch serve one call at a time

} // namespace
