"Shortcuts: what is planted in labelled films and in pairs is found by its own probe, and where nothing is planted the probes keep quiet. SOAK=N takes N seeds"
import cv2,numpy as np,pytest,torch
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from deepfake_nb.batches import PairDataset,pair_loader,window_loader
from deepfake_nb.controls import BAND
from deepfake_nb.datasets import read_dataset
from deepfake_nb.manifest import pack_manifest
from deepfake_nb.metrics import auc
from deepfake_nb.miniatures import miniature
from deepfake_nb.scoring import face_heights
from deepfake_nb.shortcuts import _row,LEAST,PROBES,as_json,kept_whole,permuted,seen_of_batches,shortcuts,shuffled,unseen_scores
from deepfake_nb.stores import build_store
from deepfake_nb.video import VideoFile,recompress,write_video

from common import count

SEED = 20268

@pytest.fixture(scope='module', autouse=True)
def alone(): torch.set_num_threads(1); cv2.setNumThreads(1)

def fires(table): return {k for k in table.index if table.verdict[k].startswith('tells')}
def arrays(items): return tuple(np.array([getattr(s, k) for s in items]) for k in ('label','group','unit'))

@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "17 originals of 7 people and 25 fakes, at two compressions; and the same fakes at half the size, and under a warm cast"
    d = tmp_path_factory.mktemp('films'); m = read_dataset(miniature('faceforensics', d, frames=8, compressions=('c23','c40'), methods=('Deepfakes','FaceSwap')))
    def small(f): return cv2.resize(f, (f.shape[1]//4*2, f.shape[0]//4*2), interpolation=cv2.INTER_AREA)
    def warm(f): return np.clip(f*np.array([1.3,1,.77]), 0, 255).astype(np.uint8)
    def rewritten(name, f):
        for v in m:
            if v.label and v.compression=='c23': p = d/name/f'{v.method}-{v.name}.mp4'; write_video(p, (f(x.image) for x in VideoFile(v.path)), qp=24); yield replace(v, path=p, method=f'{v.method}-{name}')
    whole = m.like([*m, *rewritten('small', small), *rewritten('warm', warm)])
    store = build_store(whole, d/'store', size=112, boxes='own').store(); heights = face_heights(store, store.tracks)
    def some(name, compression='c23', sizes=True):
        ours = [t for t in store.tracks if (k := t.video.split('/')[1:3]) and (k==['real','c23'] if not t.label else k[1]==compression and k[0].endswith(name or ('Deepfakes','FaceSwap','Detection')))]
        return seen_of_batches(window_loader(SimpleNamespace(tracks=ours, read=store.read, folder=store.folder), 4, most=2, batch=4), 50, heights if sizes else None)
    return some

def test_films_are_kept_by_person_and_nothing_planted_is_not_found(films):
    items = films(''); t = shortcuts(items, 300)
    assert {s.label for s in items}=={0,1} and all(np.isfinite(s.height) for s in items) and len({s.group for s in items})==7
    assert set(t.folds)=={'by person'} and set(t.within)=={'within 7 people'} and (t.left_out==0).all()
    assert fires(t)<={'colour only'}, t  # the miniature tints its fakes' faces: that is the forgery, and the whole crop shows it
    assert as_json(t)['codec only']['folds']=='by person'

@pytest.mark.parametrize('name,compression,probe', [('','c40','codec only'), ('small','c23','resolution only'), ('warm','c23','colour only')])
def test_what_is_planted_in_films_is_found(films, name, compression, probe):
    t = shortcuts(films(name, compression), 300)
    assert probe in fires(t) and t.auc[probe]>.7 and 'shuffled labels' not in fires(t), t

def test_without_a_height_small_films_are_harder_to_find(films):
    "An encoder at QP 24 and the crop's own enlargement hide much: the sharpness alone is no proof in 50 clips"
    t = shortcuts(films('small', sizes=False), 300); print(t[['auc','lo','hi']].round(2))
    assert .5<t.auc['resolution only']<shortcuts(films('small'), 300).auc['resolution only'], t

@pytest.fixture(scope='module')
def pack(tmp_path_factory):
    store = build_store(pack_manifest(['man','carphone','woman']), tmp_path_factory.mktemp('pack'), size=112).store()
    return lambda n,seed,**kw: seen_of_batches(pair_loader(PairDataset(store, {t.group for t in store.tracks}, 3, seed, **kw), 1, n), n)

def test_false_alarms_on_pairs_with_nothing_planted(pack):
    "An interval of 95 % leaves chance upwards in one of forty: of three probes and 20 seeds, in one or two of sixty"
    n = count(20); rows = [shortcuts(pack(24, seed), 300, seed, 3) for seed in range(n)]
    told = {k:sum(k in fires(t) for t in rows) for k in rows[0].index}; print(f'alarms of {n} seeds: {told}')
    assert sum(told[k] for k in PROBES)<=max(1, .025*len(PROBES)*n) and told['shuffled labels']==0
    assert all(abs(np.mean([t.auc[k] for t in rows])-.5)<.03 for k in told)

def test_false_alarms_on_films_with_labels_that_mean_nothing(films):
    "The clips are read once, and their labels exchanged among videos: of three probes and 60 shuffles at most the expected number fires"
    items = films(''); y,group,unit = arrays(items); n = count(60); seen = {k:np.stack([f(s) for s in items]) for k,f in PROBES.items()}
    told = {k:sum(_row(k, X, t, group, unit, 200, i, 0, 0)['verdict'].startswith('tells') for i,t in enumerate(shuffled(y, unit, n, np.random.default_rng(SEED)))) for k,X in seen.items()}
    print(f'alarms of {n} shuffles: {told} (seed {SEED})'); assert sum(told.values())<=.025*len(PROBES)*n

@pytest.mark.parametrize('probe,fake,real', [('codec only', lambda x: recompress(x, 33)[0], lambda x: recompress(x, 23)[0]),
    ('resolution only', lambda x: np.stack([cv2.resize(cv2.resize(f, (56,56), interpolation=cv2.INTER_AREA), (112,112)) for f in x]), lambda x: x),
    ('colour only', lambda x: np.clip(x*np.array([1.25,1,.8]), 0, 255).astype(np.uint8), lambda x: x)])
def test_what_is_planted_in_pairs_is_found(pack, probe, fake, real):
    t = shortcuts([s._replace(frames=(fake if s.label else real)(s.frames)) for s in pack(24, 0, codec=False)], 300)
    assert probe in fires(t) and t.auc.idxmax()==probe and 'shuffled labels' not in fires(t), t

def test_shuffles_keep_what_is_never_split():
    "500 random sets of pairs and videos"
    rng = np.random.default_rng(SEED)
    for _ in range(500):
        y,unit = [],[]
        for u in range(rng.integers(2, 9)): k = rng.integers(1, 5); pair = rng.random()<.5; y += [0,1]*k if pair else [int(rng.integers(2))]*k; unit += [u]*(2*k if pair else k)
        y,unit = np.array(y),np.array(unit); t = shuffled(y, unit, 5, rng)
        for u in set(unit):
            mixed = len(set(y[unit==u]))==2
            assert (t[:,unit==u].sum(1)==y[unit==u].sum()).all() if mixed else (np.ptp(t[:,unit==u], axis=1)==0).all()
        first = np.array([np.flatnonzero(unit==u)[0] for u in set(unit) if len(set(y[unit==u]))==1], int)
        assert (t[:,first].sum(1)==y[first].sum()).all()

def test_p_of_nothing_is_even_and_of_something_small():
    rng = np.random.default_rng(SEED); y,u = np.tile([0,1], 20),np.repeat(np.arange(20), 2)
    for labels,units in ((y, u), (np.repeat(np.arange(20)%2, 2), u)):
        p = np.array([permuted(rng.normal(size=40), labels, units, 200, i)['p'] for i in range(400)])
        assert abs((p<=.05).mean()-.05)<.03 and abs(p.mean()-.5)<.05 and p.min()>=1/201
        sure = permuted(labels+rng.normal(0, .3, 40), labels, units, 999); assert sure['p']<=.002 and sure['auc']>.9>sure['hi']

def test_nobody_is_on_both_sides():
    "A name is all that can be learned: kept whole, it is worth nothing; split, everything"
    rng = np.random.default_rng(SEED); who = np.repeat(np.arange(12), 6); y = (who%2).astype(int); X = rng.normal(size=(12,20))[who]
    assert kept_whole(y, who, np.arange(72)) is who and auc(unseen_scores(X, y, who), y)<.8 and auc(unseen_scores(X, y, np.arange(72)), y)>.99
    assert min(len(set(who[y==c])) for c in (0,1))<LEAST and BAND[0]<.5<BAND[1]
