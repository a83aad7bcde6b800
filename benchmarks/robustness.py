"What a robustness sweep costs: seconds a setting by family, the shares of reading, damaging and scoring, and the whole standard sweep over 20 clips. Self-blended couples of the pack, or a store of one's own; an untrained specialist with the pack's backbone, or a checkpoint. The last line is one JSON object"
import argparse,json,tempfile,time
import torch
from deepfake_nb.balance import Position
from deepfake_nb.clips import FaceStore
from deepfake_nb.manifest import pack_manifest
from deepfake_nb.robustness import settings_for,sweep,sweep_clips
from deepfake_nb.scoring import Detector,load_detector
from deepfake_nb.specialists.base import SpecialistConfig
from deepfake_nb.specialists.examples import BlendedCouples
from deepfake_nb.specialists.team import build_specialist
from deepfake_nb.stores import build_store

def untrained(code):
    "A specialist that costs what a trained one costs"
    m = build_specialist(SpecialistConfig(code, 'tf_efficientnet_lite0'), 'pack').eval(); n = m.module.needs
    return Detector(m, code, 'Specialist', n.frames, n.extras, f'untrained {code}')

def couples(n, length):
    "Real clips of the pack and their self-blends, kept in memory: reading them costs nothing, and the share of reading says so"
    store = build_store(pack_manifest(), tempfile.mkdtemp(), native=True, spans=2, span=48).store()
    ds = BlendedCouples(store, {t.group for t in store.tracks}, length, native=True)
    return [c for i in range(n//2) for c in ds[Position('', 0, i)][1:3]]

p = argparse.ArgumentParser(description=__doc__)
p.add_argument('--clips', type=int, default=20); p.add_argument('--length', type=int, default=20, help='frames of a clip'); p.add_argument('--codes', default='CM,TM'); p.add_argument('--detectors', nargs='*', help='folders of checkpoints')
p.add_argument('--store', help='a face store of both labels, read clip by clip'); p.add_argument('--families', nargs='*'); p.add_argument('--threads', type=int, default=2); a = p.parse_args()
torch.set_num_threads(a.threads); torch.manual_seed(0)
detectors = [load_detector(f) for f in a.detectors] if a.detectors else [untrained(c) for c in a.codes.split(',')]
clips = sweep_clips(FaceStore(a.store), a.length, a.clips) if a.store else couples(a.clips, a.length); settings = settings_for(a.families or 'standard')
start = time.perf_counter(); table = sweep(detectors, clips, tempfile.mkdtemp(), settings); wall = time.perf_counter()-start
done = table[table.n>0]; first = done.drop_duplicates('setting').set_index('setting').shared; score = done.groupby('setting').seconds.sum()
cost = (first+score).groupby(done.drop_duplicates('setting').set_index('setting').family, sort=False).mean()
print(cost.round(2).to_string())
print(json.dumps(dict(settings=int(done.setting.nunique()), refused=sorted(set(table[table.n==0].setting)), clips=len(clips), frames=a.length, detectors=[d.name for d in detectors], wall_s=round(wall, 1), damage_s=round(float(first.sum()), 1), score_s={d:round(float(v), 1) for d,v in done.groupby('detector', sort=False).seconds.sum().items()},
    damage_share=round(float(first.sum()/wall), 3), score_share=round(float(score.sum()/wall), 3), seconds_a_setting={k:round(float(v), 2) for k,v in cost.items()})))
