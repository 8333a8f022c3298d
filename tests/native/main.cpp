// Usage: PROGRAM [COUNT [SEED]]. Does libFuzzer's work with COUNT random inputs, seeded from SEED
// on, and prints the seed of an input that fails. With PLANT set it runs a defect of that name
// instead, which the sanitizer must find.
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <random>
#include <string>
#include <thread>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t);

namespace {

unsigned input_seed;

void plant(const std::string& defect) {
  volatile int zero = 0;
  if (defect == "overflow") {
    std::vector<int> values(3);
    zero = values.data()[3 + zero];
  } else if (defect == "undefined") {
    zero = INT_MAX - zero + 1;
  } else if (defect == "race") {
    int shared = 0;
    std::thread other([&] { ++shared; });
    ++shared;
    other.join();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (const char* defect = getenv("PLANT")) {
    plant(defect);
    return 0;
  }
  const unsigned count = argc > 1 ? unsigned(atol(argv[1])) : 1000;
  const unsigned first = argc > 2 ? unsigned(atol(argv[2])) : 1;
  signal(SIGABRT, [](int) { fprintf(stderr, "this was the input of seed %u\n", input_seed); });
  for (unsigned i = 0; i < count; ++i) {
    std::mt19937 generator(input_seed = first + i);
    std::vector<uint8_t> input(generator() % 64);
    for (uint8_t& byte : input) byte = uint8_t(generator());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  printf("%u inputs from seed %u\n", count, first);
}
