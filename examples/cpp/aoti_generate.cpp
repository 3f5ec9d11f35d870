// Greedy generation with a bundle of the kind aoti, without Python.
//
//   aoti_generate BUNDLE COUNT TOKEN...     prints the prompt's token ids and COUNT more
//
// The package is native code: check the bundle before (`arriero infer` does, by the SHA-256 of every file), or know where it
// is from. Inputs and their order: src/arriero/export/torch_program.py.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

#include "arguments.h"
#include "json.h"

using torch::Tensor;
using torch::inductor::AOTIModelPackageLoader;

namespace {

Json read_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  std::stringstream text;
  text << file.rdbuf();
  return Json::parse(text.str());
}

// The tensors of a safetensors file by name, in the order of names; the file stays mapped.
std::vector<Tensor> map_weights(const std::string& path) {
  int descriptor = open(path.c_str(), O_RDONLY);
  struct stat about {};
  if (descriptor < 0 || fstat(descriptor, &about) != 0) throw std::runtime_error(path + ": cannot be read");
  auto size = static_cast<uint64_t>(about.st_size);
  void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  uint64_t length = 0;
  if (mapped == MAP_FAILED || size < 8) throw std::runtime_error(path + ": cannot be mapped");
  std::memcpy(&length, mapped, 8);
  if (length > size - 8) throw std::runtime_error(path + ": is broken");
  char* text = static_cast<char*>(mapped) + 8;
  const std::map<std::string, torch::Dtype> dtypes = {
      {"F32", torch::kFloat32}, {"F16", torch::kFloat16}, {"BF16", torch::kBFloat16}, {"U8", torch::kUInt8}};
  std::vector<Tensor> found;
  for (const auto& [name, entry] : Json::parse({text, length}).object) {
    if (name == "__metadata__") continue;
    std::vector<int64_t> shape;
    for (const auto& one : entry.at("shape").array) shape.push_back(one.integer());
    auto begin = static_cast<uint64_t>(entry.at("data_offsets").array.at(0).integer());
    auto end = static_cast<uint64_t>(entry.at("data_offsets").array.at(1).integer());
    Tensor tensor = torch::from_blob(text + length + begin, shape, dtypes.at(entry.at("dtype").string));
    if (begin > end || end > size - 8 - length || tensor.nbytes() != end - begin)
      throw std::runtime_error(path + ": " + name + " lies outside of it");
    found.push_back(tensor);
  }
  return found;
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 4) throw std::runtime_error("usage: aoti_generate BUNDLE COUNT TOKEN...");
  const std::string folder = arguments[1];

  c10::InferenceMode no_gradients;
  const Json manifest = read_json(folder + "/manifest.json");
  if (manifest.at("kind").string != "aoti") throw std::runtime_error(folder + ": is no bundle of the kind aoti");
  const Json& config = manifest.at("config");
  const int64_t context = manifest.at("context").integer(), layers = config.at("num_hidden_layers").integer();
  const int64_t heads = config.at("num_key_value_heads").integer(), head_dim = config.at("head_dim").integer();
  int64_t wanted = 0;
  std::vector<int64_t> tokens = prompt_tokens(count, arguments, config.at("vocab_size").integer(), context, wanted);

  const std::string package = folder + "/" + manifest.at("graph").string;
  // Of int8 and int4 one program goes on with any number of sequences, whose caches lie in one tensor.
  const bool integers = manifest.at("weights").string.rfind("int", 0) == 0;
  AOTIModelPackageLoader step(package, "step"), decode(package, integers ? "rows" : "decode_1");
  // What a program was compiled for; it does not look at the shapes of its inputs.
  for (auto* program : {&step, &decode})
    if (program->get_metadata()["arriero_context"] != std::to_string(context))
      throw std::runtime_error(package + ": is not compiled for the context of the manifest, " + std::to_string(context));
  const std::vector<Tensor> weights = map_weights(folder + "/weights.safetensors");
  // Keys and values of one sequence; zeros, since nothing that is read may be no number.
  std::vector<Tensor> caches, row;
  for (int64_t layer = 0; layer < layers; ++layer) {
    caches.push_back(torch::zeros({1, 2 * heads, context, head_dim}));
    row.push_back(caches.back()[0]);
  }
  const Tensor span = torch::arange(context);
  const auto size = static_cast<int64_t>(tokens.size());

  // The prompt: (1, S) tokens, where they begin, the length, and whose logits are wanted.
  std::vector<Tensor> inputs = {
      torch::tensor(tokens).view({1, size}), torch::zeros({1}, torch::kInt64), span.slice(0, 0, size),
      torch::tensor({size - 1})};
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  inputs.insert(inputs.end(), caches.begin(), caches.end());
  Tensor logits = step.run(inputs)[0];

  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < wanted; ++i) {
    tokens.push_back(logits[0].argmax().item<int64_t>());
    if (i + 1 == wanted) break;
    const auto at = static_cast<int64_t>(tokens.size()) - 1;
    inputs = {torch::tensor({tokens.back()}), torch::tensor({at})};
    if (!integers) inputs.push_back(span.slice(0, 0, at + 1));
    inputs.insert(inputs.end(), weights.begin(), weights.end());
    const std::vector<Tensor>& own = integers ? caches : row;
    inputs.insert(inputs.end(), own.begin(), own.end());
    logits = decode.run(inputs)[0];
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  for (auto token : tokens) std::cout << token << ' ';
  std::cout << std::endl;
  if (wanted > 1) std::cerr << (wanted - 1) / seconds.count() << " tokens/s" << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << "aoti_generate: " << error.what() << std::endl;
  return 2;
}
