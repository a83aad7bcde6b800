"The monitor over 24 runs of 10,000 rows: the first reading, a look after a few new rows each, the page, a live table; and what the naive way costs. The last line is one JSON object."
import argparse,json,random,resource,statistics,tempfile,time,tracemalloc
from pathlib import Path
from types import SimpleNamespace
from deepfake_nb.journal import read_rows
from deepfake_nb.monitor import Events,Live,Monitor,fragment,overview,page
from deepfake_nb.pack import write_json

CODES = ('BG','AV','CM','RR','LL','TM')
TEAM = {1:SimpleNamespace(models=CODES[:2]), 2:SimpleNamespace(models=CODES[2:4]), 3:SimpleNamespace(models=CODES[4:])}

def row(step, rng):
    "As a training writes it"
    r = lambda: rng.random()
    return json.dumps(dict(time=1.8e9+2*step, step=step, loss=r(), hll=r(), ce=r(), s_real=-r(), s_fake=-r(), rejected=0., norm=7*r(), lr=1e-4))+'\n'

def judged(step, rng): return json.dumps(dict(time=1.8e9+2*step, step=step, evaluation=dict(auc=rng.random(), real=.8, fake=.7, gap=.1, videos=140, abstained=0., alarm='')))+'\n'

def share(root, runs, rows, rng):
    "Runs with records, statuses, rows, and checkpoints beside them"
    folders = [root/f'person {1+i%3}/runs/20261128T10{i:02}00Z-specialist_stage-0000000-{i:06x}' for i in range(runs)]
    for i,f in enumerate(folders):
        f.mkdir(parents=True); write_json(f/'run.json', dict(stage='specialist_stage', status='running', parameters=dict(specialist=CODES[i%6], stage=1+i//6, seed=0), started=f'2026-11-28T10:{i:02}:00', metrics=None))
        with open(f/'metrics.jsonl', 'w') as o: o.writelines(row(n, rng)+(judged(n, rng) if n%500==0 else '') for n in range(1, rows+1))
        c = root/f'person {1+i%3}/checkpoints/{CODES[i%6]}-{i:08x}/stage_{1+i//6}'; c.mkdir(parents=True)
        for k in (1, 2):
            for x in ('json','pt','safetensors'): (c/f'{k:06}-step{k*rows//2:08}.{x}').write_bytes(b'x'*1000)
    return folders

def grow(folders, step, n, rng):
    "A few rows more each, and a heartbeat"
    for f in folders:
        with open(f/'metrics.jsonl', 'a') as o: o.writelines(row(step+k, rng) for k in range(n))
        write_json(f/'status.json', dict(state='running', step=step+n, steps=20_000, loss=.5, speed=.5, eta=3600., spent=.4, dollars=2.5, left=2.1, checkpoint=step//2, time=1.8e9+2*(step+n), pid=1))

def timed(f):
    t = time.perf_counter(); got = f(); return time.perf_counter()-t,got

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--runs', type=int, default=24); p.add_argument('--rows', type=int, default=10_000); p.add_argument('--looks', type=int, default=20); p.add_argument('--new', type=int, default=5)
    a = p.parse_args(); rng = random.Random(0); res = dict(benchmark='monitor', runs=a.runs, rows=a.rows)
    with tempfile.TemporaryDirectory() as d:
        root = Path(d)/'share'; folders = share(root, a.runs, a.rows, rng); grow(folders, a.rows, 1, rng); res['mbytes'] = sum((f/'metrics.jsonl').stat().st_size for f in folders)/1e6
        firsts,cpu = [],[]
        for _ in range(3): m = Monitor(root, team=TEAM); c = time.process_time(); firsts.append(timed(m.look)[0]); cpu.append(time.process_time()-c)
        res['first_s'],res['first_worst_s'],res['first_cpu_s'] = statistics.median(firsts),max(firsts),statistics.median(cpu) # wall, and what it took of a core
        looks,tables,step = [],[],a.rows+1
        for _ in range(a.looks): grow(folders, step, a.new, rng); step += a.new; s,snap = timed(m.look); looks.append(s); tables.append(timed(lambda: fragment(snap))[0])
        assert all(r['rows']==step+a.rows//500 and r['state']=='running' for r in snap['runs']) and len(snap['runs'])==a.runs
        res['look_s'],res['look_worst_s'],res['table_s'] = statistics.median(looks),max(looks),statistics.median(tables)
        live = Live(m, 0.); grow(folders, step, a.new, rng); res['live_s'] = timed(lambda: live.update(True))[0]
        res['page_kb'],res['terminal_s'] = len(page(snap))/1e3,timed(lambda: overview(snap))[0]
        res['process_peak_mb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024 # before the naive reading and TensorBoard
        res['naive_look_s'] = timed(lambda: [read_rows(f) for f in folders])[0]; res['look_over_naive'] = res['look_s']/res['naive_look_s']
        tm = Monitor(root, team=TEAM, rows=True); tm.look(); ev = Events(Path(d)/'tb'); res['tensorboard_first_s'] = timed(lambda: tm.events(ev))[0]; ev.close(); del tm
        tracemalloc.start(); m = Monitor(root, team=TEAM); m.look(); now,peak = tracemalloc.get_traced_memory(); tracemalloc.stop(); res['held_mb'],res['reading_peak_mb'] = now/1e6,peak/1e6
    for k,v in res.items(): print(f'{k:20} {v:.4g}' if isinstance(v, float) else f'{k:20} {v}')
    print(json.dumps(res))

if __name__=='__main__': main()
