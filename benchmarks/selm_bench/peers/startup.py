"""So many Python interpreters at once that import torch and transformers' model classes. Usage: startup.py N"""

import subprocess
import sys
import time

from common import emit

start = time.perf_counter()
processes = [subprocess.Popen([sys.executable, "-c", "import torch, transformers; from transformers import AutoModelForCausalLM, AutoTokenizer"])
             for _ in range(int(sys.argv[1]))]
if max(process.wait() for process in processes) != 0:
    sys.exit("an interpreter failed")
emit({"seconds": time.perf_counter() - start})
