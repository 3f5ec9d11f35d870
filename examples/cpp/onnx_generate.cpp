// Greedy generation with a bundle of the kind onnx, without Python.
//
//   onnx_generate BUNDLE COUNT TOKEN...     prints the prompt's token ids and COUNT more
//
// Inputs and outputs of the graph: src/arriero/export/onnx_graph.py.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"

namespace {

const OrtApi* const api = OrtGetApiBase()->GetApi(ORT_API_VERSION);

void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

struct Value {  // a tensor over memory that others own
  OrtValue* value = nullptr;
  Value() = default;
  template <typename T>
  Value(std::vector<T>& data, const std::vector<int64_t>& shape, ONNXTensorElementDataType kind) {
    OrtMemoryInfo* memory = nullptr;
    check(api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory));
    OrtStatus* status = api->CreateTensorWithDataAsOrtValue(
        memory, data.data(), data.size() * sizeof(T), shape.data(), shape.size(), kind, &value);
    api->ReleaseMemoryInfo(memory);
    check(status);
  }
  Value(Value&& other) noexcept : value(std::exchange(other.value, nullptr)) {}
  Value& operator=(Value&& other) noexcept {
    std::swap(value, other.value);
    return *this;
  }
  ~Value() {
    if (value != nullptr) api->ReleaseValue(value);
  }
};

constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
constexpr auto kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

struct Port {
  std::string name;
  std::vector<int64_t> shape;
};

Port port(OrtSession* session, size_t number, bool input) {
  OrtAllocator* allocator = nullptr;
  check(api->GetAllocatorWithDefaultOptions(&allocator));
  char* name = nullptr;
  OrtTypeInfo* about = nullptr;
  check(input ? api->SessionGetInputName(session, number, allocator, &name)
              : api->SessionGetOutputName(session, number, allocator, &name));
  check(input ? api->SessionGetInputTypeInfo(session, number, &about)
              : api->SessionGetOutputTypeInfo(session, number, &about));
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  check(api->CastTypeInfoToTensorInfo(about, &tensor));
  size_t dimensions = 0;
  check(api->GetDimensionsCount(tensor, &dimensions));
  Port found{name, std::vector<int64_t>(dimensions)};
  check(api->GetDimensions(tensor, found.shape.data(), dimensions));
  check(api->AllocatorFree(allocator, name));
  api->ReleaseTypeInfo(about);
  return found;
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 4) throw std::runtime_error("usage: onnx_generate BUNDLE COUNT TOKEN...");
  if (api == nullptr) throw std::runtime_error("the library is older than the header that this was built with");
  const std::string graph = std::string(arguments[1]) + "/model.onnx";

  OrtEnv* environment = nullptr;
  OrtSessionOptions* options = nullptr;
  OrtSession* session = nullptr;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "arriero", &environment));
  check(api->CreateSessionOptions(&options));
  check(api->CreateSession(environment, graph.c_str(), options, &session));

  // Keys and values of one sequence: the same memory is past and present.
  size_t inputs = 0;
  check(api->SessionGetInputCount(session, &inputs));
  std::vector<std::string> past, present;
  std::vector<std::vector<float>> memory;
  std::vector<Value> caches;
  int64_t context = 0;
  for (size_t i = 0; i < inputs; ++i) {
    Port found = port(session, i, true);
    if (found.name.rfind("past_key_values", 0) != 0) continue;
    found.shape[0] = 1;
    context = found.shape[2];
    memory.emplace_back(found.shape[1] * found.shape[2] * found.shape[3]);
    caches.emplace_back(memory.back(), found.shape, kFloat);
    past.push_back(found.name);
    present.push_back("present" + found.name.substr(std::string("past_key_values").size()));
  }
  const int64_t vocabulary = port(session, 0, false).shape[1];
  int64_t wanted = 0;
  std::vector<int64_t> tokens = prompt_tokens(count, arguments, vocabulary, context, wanted);

  std::vector<const char*> input_names = {
      "input_ids", "query_lengths", "seqlens_k", "total_sequence_length", "logits_at"};
  std::vector<const char*> output_names = {"logits"};
  for (const auto& name : past) input_names.push_back(name.c_str());
  for (const auto& name : present) output_names.push_back(name.c_str());

  std::vector<float> logits(vocabulary);
  auto run = [&](std::vector<int64_t> ids, int64_t before) {
    const auto size = static_cast<int64_t>(ids.size());
    std::vector<int32_t> lengths = {static_cast<int32_t>(size)}, last = {static_cast<int32_t>(before + size - 1)};
    std::vector<int32_t> total = {static_cast<int32_t>(before + size)};
    std::vector<int64_t> at = {size - 1};
    Value given[] = {{ids, {1, size}, kInt64}, {lengths, {1}, kInt32}, {last, {1}, kInt32}, {total, {}, kInt32}, {at, {1}, kInt64}};
    Value result(logits, {1, vocabulary}, kFloat);
    std::vector<const OrtValue*> in;
    std::vector<OrtValue*> out = {result.value};
    for (const auto& one : given) in.push_back(one.value);
    for (const auto& one : caches) {
      in.push_back(one.value);
      out.push_back(one.value);
    }
    check(api->Run(session, nullptr, input_names.data(), in.data(), in.size(), output_names.data(), out.size(), out.data()));
    return std::max_element(logits.begin(), logits.end()) - logits.begin();
  };

  int64_t next = run(tokens, 0);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < wanted; ++i) {
    tokens.push_back(next);
    if (i + 1 < wanted) next = run({next}, static_cast<int64_t>(tokens.size()) - 1);
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  for (auto token : tokens) std::cout << token << ' ';
  std::cout << std::endl;
  if (wanted > 1) std::cerr << (wanted - 1) / seconds.count() << " tokens/s" << std::endl;
  api->ReleaseSession(session);
  api->ReleaseSessionOptions(options);
  api->ReleaseEnv(environment);
  return 0;
} catch (const std::exception& error) {
  std::cerr << "onnx_generate: " << error.what() << std::endl;
  return 2;
}
