// Usage: team LIBRARY. The look-up of the OpenMP runtime: LIBRARY needs the runtime and is loaded
// with RTLD_LOCAL, as torch is on aarch64. The runtime must not be found before, must be found
// through LIBRARY, and the runtime's threads must do the work.
#include <dlfcn.h>
#include <stdio.h>

#include <atomic>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/engine.cpp"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const auto fail = [](const char* what) {
    fprintf(stderr, "%s\n", what);
    return 1;
  };
  if (dlsym(RTLD_DEFAULT, "GOMP_parallel") != nullptr) return fail("the runtime is visible to all");
  if (!kto::find_openmp(argv[1]).empty()) return fail("a runtime is found before there is one");
  if (dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) == nullptr) return fail(dlerror());
  const std::string found = kto::find_openmp(argv[1]);
  if (found.find("gomp") == std::string::npos) return fail("the runtime is not found");

  // OpenMP's team keeps its threads for the next call; threads of our own would be new each time.
  std::set<std::thread::id> seen;
  for (int call = 0; call < 5; ++call) {
    std::atomic<int> arrived{0};
    std::vector<std::thread::id> ids(2);
    struct Shared {
      std::atomic<int>& arrived;
      std::vector<std::thread::id>& ids;
    } shared{arrived, ids};
    kto::run_team(
        2,
        [](void* argument) {
          Shared& shared = *static_cast<Shared*>(argument);
          shared.ids[shared.arrived++] = std::this_thread::get_id();
          while (shared.arrived < 2) std::this_thread::yield();
        },
        &shared);
    seen.insert(ids.begin(), ids.end());
  }
  if (seen.size() != 2) return fail("other threads at every call");
  printf("%s\n", found.c_str());
}
