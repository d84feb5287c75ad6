"""What a Raspberry Pi computes: the shim and the arm64 wheel's libraries, in an emulator."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgekit.formats.executorch import shim_build
from edgekit.formats.executorch.runtime import ExecutorchSession
from edgekit.tests.needs import needs
from edgekit.tests.tiny.executorch_artifacts import CONTEXT_TOKENS, IDS, greedy, tiny


# torch makes the programs that run without it here.
pytestmark = [pytest.mark.toolchain, pytest.mark.slow, needs("numpy", "torch")]
VERSION = shim_build.installed_version()
if VERSION is None:
    pytest.skip("pip install 'edgekit[executorch]'", allow_module_level=True)

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
SYSROOT = Path("/usr/aarch64-linux-gnu")
if not (shutil.which(COMPILER) and shutil.which(EMULATOR) and SYSROOT.is_dir()):
    pytest.skip("apt install g++-aarch64-linux-gnu qemu-user-static", allow_module_level=True)

ANSWER_TOKENS = 24
# Reads a prompt's ids and says the likeliest tokens after it, one a line.
MAIN = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct Decoder;
extern "C" {
void edgekit_start();
const char* edgekit_log();
int edgekit_threads(int wanted);
int edgekit_open(const char* path, bool maps_file, Decoder** opened);
int edgekit_read(Decoder* decoder, const int64_t* tokens, int count, int64_t position,
                 const float** logits, int64_t* rows, int64_t* width);
}

int main(int count, char** words) {
  std::vector<int64_t> ids;
  for (int index = 3; index < count; ++index) ids.push_back(std::atoll(words[index]));
  Decoder* decoder = nullptr;
  edgekit_start();
  edgekit_threads(1);
  int status = edgekit_open(words[1], true, &decoder);
  int64_t position = 0;
  for (int left = std::atoi(words[2]); status == 0 && left > 0; --left) {
    const float* logits = nullptr;
    int64_t rows = 0, width = 0, best = 0;
    status = edgekit_read(decoder, ids.data(), ids.size(), position, &logits, &rows, &width);
    if (status != 0) break;
    logits += (rows - 1) * width;
    for (int64_t token = 1; token < width; ++token) {
      if (logits[token] > logits[best]) best = token;
    }
    std::printf("%lld\\n", static_cast<long long>(best));
    position += ids.size();
    ids.assign(1, best);
  }
  if (status != 0) std::fprintf(stderr, "error %d: %s", status, edgekit_log());
  return status;
}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Headers and libraries of the same release for arm64; pip's cache spares the network."""
    home = tmp_path_factory.mktemp("arm64")
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "-q", f"executorch=={VERSION}", "--no-deps",
            "--only-binary=:all:", "--platform", "manylinux_2_28_aarch64", "-d", str(home),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"pip download executorch for arm64: {done.stderr.strip().splitlines()[-1]}")
    (path,) = home.glob("*.whl")
    archive = zipfile.ZipFile(path)
    wanted = ("executorch/lib/", "executorch/include/")
    archive.extractall(home, [name for name in archive.namelist() if name.startswith(wanted)])
    return home / "executorch"


@pytest.fixture(scope="module")
def program(wheel, tmp_path_factory):
    """The shim and a main function, compiled for arm64."""
    home = tmp_path_factory.mktemp("program")
    main, output = home / "main.cpp", home / "main"
    main.write_text(MAIN)
    command = shim_build.compile_command(COMPILER, wheel, output, sources=(shim_build.SOURCE, main))
    command.remove("-shared")
    quantized = f"-l{shim_build.QUANTIZED_KERNELS}"  # what Python loads where it is needed
    done = subprocess.run([*command, quantized], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


@pytest.mark.parametrize("processor", ["cortex-a72", "cortex-a76"])  # of a Pi 4, and of a Pi 5
@pytest.mark.parametrize("recipe", ["F32", "8da4w", "8da4w_all"])
def test_arm64_says_the_same_tokens(recipe, processor, program):
    path = tiny(recipe=recipe) / "model.pte"
    session = ExecutorchSession(path, context_tokens=CONTEXT_TOKENS, threads=1)
    expected = greedy(session, IDS, ANSWER_TOKENS)
    session.close()
    words = [str(path), str(ANSWER_TOKENS), *map(str, IDS)]
    done = subprocess.run(
        [EMULATOR, "-cpu", processor, "-L", str(SYSROOT), str(program), *words],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == expected
    assert len(set(expected)) > 3
