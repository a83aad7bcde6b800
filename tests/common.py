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

def play(stage, given):
    "The cells of a stage notebook, one after the other, in this process; what they left"
    import matplotlib.pyplot as plt,nbformat
    from IPython.display import display
    from deepfake_nb.executors import notebook
    from deepfake_nb.runs import declared
    path = notebook(stage); assert not set(given)-set(declared(path))
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type=='code']; space = dict(__name__='stage', display=display)
    exec(cells[0], space); space.update(given)
    try:
        for c in cells[1:]: exec(compile(c, f'{path.name}: {c[:40]}', 'exec'), space)
    finally: plt.close('all')
    return space
