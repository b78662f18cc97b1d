"""The tool builds what TFDS has registered and nothing else, from files or a server, whatever interrupts it.

But for the last test, TFDS is told of forty images at a server of this process in place of 70,000 at a public one.
"""

import fcntl
import gzip
import hashlib
import http.server
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from meanflow_audio_codec.datasets.mnist import load_mnist
from meanflow_audio_codec.tools import prepare_mnist

tfds = pytest.importorskip("tensorflow_datasets")
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "mnist"
COUNTS = {"train": 30, "t10k": 10}
PLACE = Path("mnist", "3.0.1")
LABELS = "t10k-labels-idx1-ubyte.gz"

# Runs the tool on the small data set, each time in a fork of a process that has imported everything. A line of stdin
# is JSON: the arguments, the server's address, each file's size and SHA-256, code to execute in the midst of the build,
# and files for the output. The answer is the fork's exit status.
LAUNCHER = """
import json, os, resource, sys
import tensorflow
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.image_classification import mnist
from meanflow_audio_codec.tools import prepare_mnist

def run(arguments, url, files, code, out, err):
    for descriptor, name in (1, out), (2, err):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    mnist._TRAIN_EXAMPLES, mnist._TEST_EXAMPLES = 30, 10
    mnist.MNIST.URL = url
    mnist.MNIST.url_infos = {url + name: UrlInfo(size, digest, name) for name, (size, digest) in files.items()}
    generate = mnist.MNIST._generate_examples

    def generate_with_code(*args, **kwargs):
        for number, example in enumerate(generate(*args, **kwargs)):
            if number == 15:
                exec(code)
            yield example

    mnist.MNIST._generate_examples = generate_with_code
    prepare_mnist.main(arguments)

for line in iter(sys.stdin.readline, ""):
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        run(*json.loads(line))
        break
"""


def idx(data):
    """The bytes of an IDX file: type 8 (uint8), number of axes, the sizes, the data."""
    header = bytes([0, 0, 8, data.ndim]) + np.array(data.shape, ">i4").tobytes()
    return gzip.compress(header + data.tobytes(), mtime=0)


def read_idx(path):
    content = gzip.decompress(path.read_bytes())
    start = 4 + 4 * content[3]
    return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], ">i4"))


@pytest.fixture(scope="module")
def files():
    rng = np.random.default_rng(0)
    files = {}
    for name, count in COUNTS.items():
        files[f"{name}-images-idx3-ubyte.gz"] = idx(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{name}-labels-idx1-ubyte.gz"] = idx(rng.integers(0, 10, count, dtype=np.uint8))
    return files


@pytest.fixture
def idx_dir(files, tmp_path):
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves `files`, whose bodies may be shorter than `lengths` announces them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.lengths, self.gets = {}, {}, []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        name = self.path.rpartition("/")[2]
        self.send_response(200 if name in self.server.files else 404)
        self.send_header("Content-Length", self.server.lengths.get(name, len(self.server.files.get(name, b""))))
        self.end_headers()
        return name

    def do_GET(self):
        name = self.do_HEAD()
        self.server.gets.append(name)
        self.wfile.write(self.server.files.get(name, b""))

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The settings of processes that reach nothing but this machine, at home in an empty folder."""
    home = tmp_path_factory.mktemp("home")
    closed = "http://127.0.0.1:9"
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    # TensorFlow imports Keras, and Keras Matplotlib, which leave their settings.
    environment |= {name: str(tmp_path_factory.mktemp("settings")) for name in ("KERAS_HOME", "MPLCONFIGDIR")}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), closed)
    environment |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1")
    yield dict(env=environment, cwd=home, text=True)
    assert not list(home.rglob("*"))


@pytest.fixture(scope="module")
def launcher(place):
    command = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **place
    ) as it:
        yield it


@pytest.fixture
def run(launcher, files, tmp_path):
    """Run the tool on the small data set."""

    def run(*arguments, url="http://127.0.0.1:9/", code=""):
        known = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
        outputs = [tmp_path / "stdout", tmp_path / "stderr"]
        for path in outputs:
            path.unlink(missing_ok=True)
        arguments = [str(argument) for argument in arguments]
        print(json.dumps([arguments, url, known, code, *map(str, outputs)]), file=launcher.stdin, flush=True)
        status = int(launcher.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in outputs))

    return run


def check(done, folder):
    """A finished build of the forty images, which says so and leaves nothing else."""
    assert done.stdout == f"{folder / PLACE}: 30 train and 10 test images\n", done.stderr
    assert (done.returncode, done.stderr) == (0, f"prepare_mnist: building {folder / PLACE}, a minute's work\n")
    assert [path.relative_to(folder) for path in folder.glob("*/*")] == [PLACE]


def check_failed(done, message, folder):
    """One line that ends in the message, and nothing built."""
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("prepare_mnist: ") and done.stderr.endswith(f"{message}\n")
    assert len(done.stderr.splitlines()) <= 2  # the first says what is being built
    assert not (folder / PLACE).exists()


def check_same(data_dir, idx_dir):
    """Each image with its label, whatever order TFDS has put them in."""
    for split, prefix in ("train", "train"), ("test", "t10k"):
        images, labels = load_mnist(data_dir, split)
        found = zip(np.rint((images + 1) * 127.5).astype(np.uint8), labels, strict=True)
        originals = read_idx(idx_dir / f"{prefix}-images-idx3-ubyte.gz")
        expected = zip(originals, read_idx(idx_dir / f"{prefix}-labels-idx1-ubyte.gz"), strict=True)
        assert sorted((image.tobytes(), label) for image, label in found) == sorted(
            (image.tobytes(), label) for image, label in expected
        )


def test_downloads_builds_and_then_does_nothing(run, server, files, idx_dir, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}/"
    server.files = files
    folder = tmp_path / "a [b] {c} %d"
    check(run("--output-dir", folder, url=url), folder)
    assert sorted(server.gets) == sorted(files)
    check_same(folder, idx_dir)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run("--output-dir", folder)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == f"{folder / PLACE}: 30 train and 10 test images, there already\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


@pytest.mark.parametrize("interrupt", [signal.SIGKILL, signal.SIGINT])
def test_starts_over_after_an_interruption(run, idx_dir, tmp_path, interrupt):
    folder = tmp_path / "out"
    # A shell's background jobs ignore SIGINT, and so would the tests of one.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"os.kill(os.getpid(), {interrupt:d})"
    done = run("--output-dir", folder, "--idx-dir", idx_dir, code=code)
    if interrupt == signal.SIGINT:
        check_failed(done, "interrupted; the same command starts over", folder)
    else:
        assert done.returncode == -interrupt
        assert not (folder / PLACE).exists() and list(folder.glob("mnist/.prepare/*"))
    check(run("--output-dir", folder, "--idx-dir", idx_dir), folder)
    check_same(folder, idx_dir)


def test_a_full_disk_is_said_in_a_line(run, idx_dir, tmp_path):
    code = "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))"
    done = run("--output-dir", tmp_path / "out", "--idx-dir", idx_dir, code=code)
    check_failed(done, "", tmp_path / "out")
    assert f"{tmp_path / 'out' / 'mnist' / '.prepare'} cannot be written: " in done.stderr
    assert "File too large" in done.stderr


def test_a_wrong_file_is_named_with_its_checksum(run, idx_dir, files, tmp_path):
    (idx_dir / LABELS).write_bytes(files[LABELS][:-1] + b"x")
    done = run("--output-dir", tmp_path / "out", "--idx-dir", idx_dir)
    digest = hashlib.sha256(files[LABELS]).hexdigest()
    original = f"the original has {len(files[LABELS])} bytes and the SHA-256 {digest}"
    check_failed(done, f"{idx_dir / LABELS} is another file: {original}", tmp_path / "out")


@pytest.mark.parametrize("fault", ["altered", "cut", "gone"])
def test_a_wrong_download_is_named(run, server, files, tmp_path, fault):
    url = f"http://127.0.0.1:{server.server_port}/"
    server.files = dict(files)
    if fault == "altered":
        server.files[LABELS] = files[LABELS][:-1] + b"x"
        message = hashlib.sha256(files[LABELS]).hexdigest()
    elif fault == "cut":
        server.files[LABELS], server.lengths[LABELS] = files[LABELS][:-10], len(files[LABELS])
        message = "cannot be downloaded (ChunkedEncodingError): with the four files at hand, name their --idx-dir"
    else:
        del server.files[LABELS]
        message = "cannot be downloaded (DownloadError): with the four files at hand, name their --idx-dir"
    done = run("--output-dir", tmp_path / "out", url=url)
    check_failed(done, message, tmp_path / "out")


def fails(*arguments):
    with pytest.raises(SystemExit) as stopped:
        prepare_mnist.main([str(argument) for argument in arguments])
    assert stopped.value.code.startswith("prepare_mnist: ") and "\n" not in stopped.value.code
    return stopped.value.code


def test_a_missing_file_is_named_with_its_checksum(tmp_path):
    message = fails("--output-dir", tmp_path / "out", "--idx-dir", tmp_path)
    infos = {info.filename: info for info in tfds.builder_cls("mnist").url_infos.values()}
    (name,) = [name for name in infos if f"{tmp_path / name} is missing: " in message]
    assert message.endswith(f"{int(infos[name].size)} bytes and the SHA-256 {infos[name].checksum}")
    assert not (tmp_path / "out").exists()


def test_no_network_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    message = fails("--output-dir", tmp_path / "out")
    assert "cannot be downloaded (ProxyError): with the four files at hand, name their --idx-dir" in message
    assert not (tmp_path / "out").exists()


def test_one_build_at_a_time(idx_dir, tmp_path):
    (tmp_path / "mnist" / ".prepare").mkdir(parents=True)
    with open(tmp_path / "mnist" / ".prepare" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = fails("--output-dir", tmp_path, "--idx-dir", idx_dir)
    assert message == f"prepare_mnist: another prepare_mnist is at work in {tmp_path / 'mnist' / '.prepare'}"


def test_what_is_in_the_way_is_named(idx_dir, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails("--output-dir", tmp_path / "file", "--idx-dir", idx_dir)
    (tmp_path / PLACE).mkdir(parents=True)
    message = fails("--output-dir", tmp_path, "--idx-dir", idx_dir)
    assert message == f"prepare_mnist: {tmp_path / PLACE} is in the way and not of this tool: remove it"


@pytest.mark.skipif(not SHARED.exists(), reason="shared data not in this checkout")
def test_builds_the_real_one_which_tfds_reads_by_its_name(place, tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "meanflow_audio_codec.tools.prepare_mnist", "--output-dir", folder]
    done = subprocess.run([*command, "--idx-dir", SHARED], capture_output=True, **place)
    assert done.stdout == f"{folder / PLACE}: 60,000 train and 10,000 test images\n", done.stderr
    assert done.stderr == f"prepare_mnist: building {folder / PLACE}, a minute's work\n"
    check_same(folder, SHARED)
    example = tfds.data_source("mnist", split="test", data_dir=folder, download=False)[0]
    images, labels = load_mnist(folder, "test[:1]")
    np.testing.assert_array_equal(example["image"][None], np.rint((images + 1) * 127.5))
    assert [example["label"]] == labels.tolist()
