"What several tests need"
import os,time

def count(sample):
    "How many cases: the sample of `make test`, or SOAK"
    return int(os.environ.get('SOAK') or sample)

def told(n, of, what, seed):
    print(f'{what}: {n} of {of} (seed {seed})')
    assert n==of

def wait_for(f, seconds=60):
    "What `f()` gives, once it gives something"
    end = time.monotonic()+seconds
    while not (got := f()):
        assert time.monotonic()<end, 'waited too long'
        time.sleep(.02)
    return got
