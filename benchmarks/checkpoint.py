"How long one checkpoint takes, what its parts cost, how much memory, and how soon a training has it back. Ratios of one run; the last line is one JSON object"
import argparse,json,statistics,subprocess,sys,tempfile,time
from functools import partial
from pathlib import Path
import timm,torch
from deepfake_nb.checkpoints import damage,estimate,latest,load_checkpoint,outlived,room,save_checkpoint,state_bytes,weights_bytes,_facts,_holds
from deepfake_nb.optimizers import AdamW8bit
from deepfake_nb.pack import atomic_write
from deepfake_nb.shelf import Shelf

def medians(calls, n):
    "Median seconds of each call: `n` rounds, the calls of a round one after the other, so that noise hits all alike"
    times = {k:[] for k in calls}
    for _ in range(n):
        for k,f in calls.items(): t = time.perf_counter(); f(); times[k].append(time.perf_counter()-t)
    return {f'{k}_s':statistics.median(v) for k,v in times.items()},{f'{k}_worst_s':max(v) for k,v in times.items()}

def memory(name): return next(int(l.split()[1])*1024 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(name))

def peak(f):
    "How far the memory of this process rises above where it was while `f` runs, bytes"
    Path('/proc/self/clear_refs').write_text('5'); before = memory('VmRSS:'); f()
    return memory('VmHWM:')-before

def trained(name, optimizer):
    "A model and an optimiser that has taken one step"
    m = timm.create_model(name, num_classes=1); m.cfg = {}; opt = optimizer(m.parameters())
    for p in m.parameters(): p.grad = torch.randn_like(p)
    opt.step(); opt.zero_grad(set_to_none=True)
    return m,opt

TAKE_UP = """import sys,time,timm,torch
from deepfake_nb.journal import Journal
from deepfake_nb.training import TrainConfig,train
torch.set_num_threads(1); m = timm.create_model(sys.argv[2], num_classes=1); m.cfg = {}
def loss(m, b): print('first step', file=sys.stderr, flush=True); return dict(loss=m(b).mean()**2)
train(m, lambda cursor: iter(lambda: torch.zeros(2, 3, 64, 64), None), loss, TrainConfig(steps=int(sys.argv[3]), lr=1e-4, device='cpu'), folder=sys.argv[1], journal=Journal(''), progress=False)"""

def take_up(folder, model, steps):
    "A fresh process, its imports and all, on this folder: seconds until its first batch is in the model; then it ends by itself"
    t = time.perf_counter(); p = subprocess.Popen([sys.executable,'-c',TAKE_UP,str(folder),model,str(steps)], stderr=subprocess.PIPE, text=True)
    for line in p.stderr:
        if line.startswith('first step'): break
    t = time.perf_counter()-t; rest = p.communicate()[1]
    if p.returncode: raise SystemExit(rest)
    return t

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--model', default='tf_efficientnet_b4', help="timm's name; by default the one of the specialists, with one logit"); p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--optimizer', choices=('adamw','adamw8bit'), default='adamw'); p.add_argument('--folder', help='on the disk to be measured; default the one of temporary files')
    a = p.parse_args(); torch.set_num_threads(1); torch.manual_seed(0)
    make = dict(adamw=torch.optim.AdamW, adamw8bit=AdamW8bit)[a.optimizer]
    (m,opt),(m2,opt2),step = trained(a.model, make),trained(a.model, make),[0]
    def state(): return dict(cursor=step[0], step=step[0], optimizer=opt.state_dict(), rng=torch.get_rng_state(), history=dict(losses=[.5]*1000))
    with tempfile.TemporaryDirectory(dir=a.folder) as d:
        d = Path(d); ck = d/'models'/'BG'/'stage_1'; shelf = Shelf(d/'models')
        def save(**kw): step[0] += 1; save_checkpoint(ck, step[0], m, state(), **kw)
        def naive(): torch.save(dict(model=m.state_dict(), **state()), d/'naive.pt')
        def resume():
            s = load_checkpoint(latest(ck), m2); opt2.load_state_dict(s['optimizer']); torch.set_rng_state(s['rng'])
        for _ in range(3): save() # from here on each save pushes one out
        weights,rest = weights_bytes(m),state_bytes(state()); f = latest(ck)
        parts = dict(weights_bytes=lambda: weights_bytes(m), state_bytes=lambda: state_bytes(state()), write_and_fsync=lambda: [atomic_write(d/n, lambda p: p.write_bytes(b)) for n,b in (('w',weights),('s',rest))],
                     sha256=lambda: [_facts(b) for b in (weights,rest)], read_back=lambda: [_holds(d/n, b) for n,b in (('w',weights),('s',rest))], look_at_the_older_one=lambda: outlived(ck, 1), room=lambda: room(ck, 0))
        mid,worst = medians(dict(save=save, save_with_shelf=partial(save, shelf=shelf), naive_torch_save=naive, verify=lambda: damage(f.folder, latest(ck).stem), resume=resume)|parts, a.rounds)
        for x,y in zip(m.parameters(), m2.parameters()): assert torch.equal(x, y)
        f = latest(ck); whole = sum(x['bytes'] for x in f.manifest['files'].values())+len((ck/f'{f.stem}.json').read_bytes())
        cpu = time.process_time(); save(); cpu = time.process_time()-cpu
        mem = {f'peak_memory_of_{k}_over_checkpoint':peak(g)/whole for k,g in dict(save=save, naive_torch_save=naive, load=resume).items()}
        run = d/'run'; take_up(run, a.model, 1); first = [take_up(run, a.model, 2+i) for i in range(3)] # each goes on from the one before
        res = dict(benchmark='checkpoint', process_start_to_first_step_s=statistics.median(first), model=a.model, optimizer=a.optimizer, rounds=a.rounds, bytes=whole, naive_bytes=(d/'naive.pt').stat().st_size, estimate_over_truth=estimate(m, bits=8 if a.optimizer=='adamw8bit' else 32)/whole,
                   **mid, save_worst_s=worst['save_worst_s'], save_cpu_s=cpu, save_over_naive=mid['save_s']/mid['naive_torch_save_s'], percent_of_training_every_3_hours=100*mid['save_s']/10800,
                   percent_of_training_every_10_minutes=100*mid['save_s']/600, **mem)
    res = {k:round(v, 6) if isinstance(v, float) else v for k,v in res.items()}
    for k,v in res.items(): print(f'{k:45} {v}')
    print(json.dumps(res))

if __name__=='__main__': main()
