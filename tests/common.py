"What several tests need"
import os,time

def count(sample):
    "How many cases: the sample of `make test`, or SOAK"
    return int(os.environ.get('SOAK') or sample)

def told(n, of, what, seed):
    print(f'{what}: {n} of {of} (seed {seed})')
    assert n==of

def fork(f):
    "Run `f` in a process of its own; it ends there, with what `f` returns"
    if pid := os.fork(): return pid
    code = 1
    try: code = f() or 0
    finally: os._exit(code)

def ended(pid):
    "How it ended: exit code, or the signal below 0"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def wait_for(f, seconds=60):
    "What `f()` gives, once it gives something"
    end = time.monotonic()+seconds
    while not (got := f()):
        assert time.monotonic()<end, 'waited too long'
        time.sleep(.02)
    return got
