"The whole proof of the specialists: six modules on six artefacts, twelve pairs of each photo, and what a clip costs; kept in records/crosstalk.json and images/crosstalk.jpg"
import argparse,json,sys,time
from dataclasses import asdict
from pathlib import Path
import matplotlib; matplotlib.use('agg')
import numpy as np,timm,torch
from deepfake_nb.checkpoints import commit
from deepfake_nb.show import house_style
from deepfake_nb.specialists.base import MODULES
from deepfake_nb.specialists.proof import make_pair,photos
from deepfake_nb.specialists.team import ORDER,crosstalk,crosstalk_figure

ROOT = Path(__file__).resolve().parent.parent

def median_ms(f, n=9):
    f(); t = []
    for _ in range(n): a = time.perf_counter(); f(); t.append(1e3*(time.perf_counter()-a))
    return float(np.median(t))

@torch.no_grad()
def cost():
    "ms a clip on one core, beside the forward pass of EfficientNet-B4 on its one frame in the same run"
    torch.set_num_threads(1); b4 = timm.create_model('efficientnet_b4', num_classes=0).eval(); x,photo = torch.randn(1,3,224,224),photos()['coffee']
    res = {}
    for c in ORDER:
        m = MODULES[c]().eval(); e = make_pair(c, photo, np.random.default_rng(0), m.needs.frames)
        e = type(e)(**{k:None if v is None else v[:1] for k,v in vars(e).items()})
        ms,base = median_ms(lambda: m(e)),median_ms(lambda: b4.forward_features(x), 5)
        res[c] = {'ms a clip':round(ms, 1), 'share of B4 %':round(100*ms/base, 1), 'frames':m.needs.frames}
    return res

p = argparse.ArgumentParser(description=__doc__); p.add_argument('--each', type=int, default=12); p.add_argument('--seed', type=int, default=0); a = p.parse_args()
table,control = crosstalk(a.each, a.seed, progress=lambda m,x: print(m, x, end=' ', flush=True, file=sys.stderr))
one = lambda q: {k:round(v, 4) if isinstance(v, float) else v for k,v in asdict(q).items()}
kept = dict(each=a.each, seed=a.seed, commit=commit(), table={m:{x:one(table.loc[m,x]) for x in ORDER} for m in ORDER}, control={x:one(control[x]) for x in ORDER}, cost=cost())
(ROOT/'records'/'crosstalk.json').write_text(json.dumps(kept, indent=1)+'\n')
house_style(); crosstalk_figure(table, control).figure.savefig(ROOT/'images'/'crosstalk.jpg', dpi=110, bbox_inches='tight')
print(json.dumps({m:{x:table.loc[m,x].accuracy for x in ORDER} for m in ORDER}))
