"""Run download_wavegen again and again in forks of one process that has imported everything.

A start so costs milliseconds, and each run still is a process of its own, to be killed. Requests
are JSON lines on stdin, each answered by a line on stdout:

    {"argv": [...], "cwd": folder, "patch": code, "out": path, "err": path}  ->  pid
    {"wait": pid, "seconds": s}  ->  exit status, negative for a signal, or null if it still runs then

The patch is executed in the fork before main.
"""

import json
import os
import sys
import time

import imageio_ffmpeg  # noqa: F401
import pyarrow.parquet  # noqa: F401
import soundfile  # noqa: F401
import yt_dlp

from meanflow_audio_codec.tools import download_wavegen, wavegen_catalogue

wavegen_catalogue._BACKOFF_SECONDS = 0.01
# Sorting its 1800 extractors takes yt-dlp half of the time of a small track; one serves here.
yt_dlp.YoutubeDL.add_default_info_extractors = lambda site: site.add_info_extractor(site.get_info_extractor("Generic"))
yt_dlp.YoutubeDL({"quiet": True}).close()


def wait(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def answer(value):
    print(json.dumps(value), flush=True)


def run(request):
    os.chdir(request["cwd"])
    for descriptor, name in (0, os.devnull), (1, request["out"]), (2, request["err"]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
    exec(request["patch"], {"os": os, "sys": sys})
    download_wavegen.main(request["argv"])


answer("ready")
for line in iter(sys.stdin.readline, ""):
    request = json.loads(line)
    if "wait" in request:
        answer(wait(request["wait"], request["seconds"]))
    elif pid := os.fork():
        answer(pid)
    else:
        run(request)
        break  # the fork ends as any interpreter does, waiting for its threads
