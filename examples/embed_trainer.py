"""The trainer inside another program: a thread trains, its events go through a queue, and a stop saves the concept.

python examples/embed_trainer.py [SECONDS]
"""

import queue
import sys
import threading
import time
from pathlib import Path

from pcs_trainer import Trainer

seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20
events = queue.Queue()
stop = threading.Event()
result = {}


def work():
    trainer = Trainer("tiny", "textboost", Path(__file__).parent / "photos", class_word="mug", out="out/embedded")
    result["concept"] = trainer.train(on_event=events.put, should_stop=stop.is_set)


worker = threading.Thread(target=work)
worker.start()
started = None
while worker.is_alive() or not events.empty():
    try:
        event = events.get(timeout=0.1)  # a window's event loop would poll here
    except queue.Empty:
        continue
    if event.kind == "step":
        started = started or time.monotonic()
        print(f"\r{event.step}/{event.total}  loss {event.data['smoothed']:.4f}", end="", flush=True)
        if time.monotonic() - started > seconds:
            stop.set()  # asks for a stop after the running step
    else:
        print(f"\n{event}")
worker.join()

concept = result["concept"]
print(f"{concept.meta['steps']} steps of {concept.method}: {concept.parameters:,} parameters for {concept.token!r}")
