"Six tiny runs on local processes and on Ray, in turn: what Ray adds after its start-up. The last line is one JSON object."
import argparse,json,statistics,tempfile,time
from pathlib import Path
import nbformat
from deepfake_nb.executors import Call,LocalExecutor,RayExecutor
from deepfake_nb.journal import METRICS_MIME

def tiny(path):
    "A stage that imports nothing: it sleeps for a second and shows its metrics"
    new = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[new('n: float = 1.', metadata=dict(tags=['parameters'])), new('import time; time.sleep(n)'), new(f"display({{'{METRICS_MIME}':dict(name='final', n=n)}}, raw=True)")])
    nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, path); return str(path)

def once(ex, nb, calls, k):
    "Seconds for all calls, from the first `submit` to the last record in the folder"
    t = time.perf_counter()
    for i in range(calls): ex.submit(Call(f'{k}-{i}', nb))
    done = list(ex.drain()); s = time.perf_counter()-t
    assert len(done)==calls and all(d.ok for d in done), [d.error or d.record['reason'] for d in done]
    return s

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--calls', type=int, default=6); p.add_argument('--slots', type=int, default=2); p.add_argument('--rounds', type=int, default=3)
    a = p.parse_args(); res = dict(benchmark='plan', calls=a.calls, slots=a.slots, rounds=a.rounds)
    with tempfile.TemporaryDirectory() as d:
        nb,t = tiny(Path(d)/'tiny.ipynb'),time.perf_counter()
        with RayExecutor(f'{d}/ray', num_cpus=a.slots) as far, LocalExecutor(f'{d}/local', slots=a.slots, devices=[]) as near:
            res['ray_start_s'] = time.perf_counter()-t
            res['ray_first_round_s'],res['local_first_round_s'] = once(far, nb, a.calls, 'first'),once(near, nb, a.calls, 'first') # workers load the package; not counted
            pairs = []
            for k in range(a.rounds): # in turn, each first every other time
                two = [('ray',far),('local',near)][::1 if k%2 else -1]
                pairs.append({n:once(ex, nb, a.calls, k) for n,ex in two}); print({n:round(s, 2) for n,s in pairs[-1].items()})
    for n in ('local','ray'): res[f'{n}_s'] = statistics.median(r[n] for r in pairs)
    res['ratios'] = [round(r['ray']/r['local'], 3) for r in pairs]; res['ray_over_local'] = statistics.median(res['ratios'])
    for k,v in res.items(): print(f'{k:20} {v:.4g}' if isinstance(v, float) else f'{k:20} {v}')
    print(json.dumps(res))

if __name__=='__main__': main()
