"Every published layout is read as its publisher left it; the defects of other readers are not ours; hostile metadata gives a `DatasetError` or skipped rows, and nothing else"
import copy,json,random,shutil,subprocess,sys
from collections import Counter
from pathlib import Path
import pytest
from deepfake_nb.datasets import LAYOUTS,MissingList,celebdf,check,deeperforensics,deepfakebench,dfdc,dfdc_preview,dfdc_test,faceforensics,fakeavceleb,main,read_dataset,wilddeepfake
from deepfake_nb.leakage import LeakError,audit
from deepfake_nb.manifest import DatasetError,Manifest
from deepfake_nb.miniatures import miniature

SEED,HOSTILE = 20266,150
OPTIONS = dict(dfdc=dict(zipped=False))

@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "A root of each layout; made once, so a test that changes one takes a copy"
    room = tmp_path_factory.mktemp('sets')
    return {n:miniature(n, room/n, frames=4, **OPTIONS.get(n, {})) for n in
            'faceforensics celebdf_v1 celebdf_v2 wilddeepfake dfdc dfdc_preview dfdc_test fakeavceleb deeperforensics folder deepfakebench'.split()}

@pytest.fixture
def mine(sets, tmp_path): return lambda n: Path(shutil.copytree(sets[n], tmp_path/sets[n].name))

def json_of(sets, name): return sets['deepfakebench']/'preprocessing'/'dataset_json'/f'{name}.json'
def splits(m): return dict(sorted(Counter(v.split for v in m).items()))
def names(m, **kw): return {v.name for v in m.where(**kw)}
def sides(m): return [{p for v in m if v.split==s for p in v.people} for s in ('train','val','test')]
def disjoint(m): a,b,c = sides(m); return not (a&b or a&c or b&c)

def test_layout_faceforensics(sets):
    m = read_dataset(sets['faceforensics']); ff = m.where(dataset='FaceForensics++')
    assert Counter(v.method for v in ff)==dict.fromkeys(['real','Deepfakes','Face2Face','FaceSwap','NeuralTextures','FaceShifter'], 10)
    assert splits(ff)==dict(train=36, val=12, test=12) and len({v.key for v in m})==len(m)
    v = ff.where(name='525_509', method='FaceShifter')[0]
    assert (v.label, v.target, v.source, v.original, v.recording)==(1, 'FaceForensics++:525', 'FaceForensics++:509', 'FaceForensics++/real/c23/525', 'youtube:j8iHnieUckQ')
    assert len({v.group for v in ff if {'524','525'}&set(v.name.split('_'))})==1
    assert disjoint(m.where(dataset='DeepFakeDetection')); audit(m)

def test_layout_celebdf_v1(sets):
    m = read_dataset(sets['celebdf_v1'])
    assert {v.dataset for v in m}=={'Celeb-DF-v1'} and names(m, split='test')=={'00170','id0_0000','id0_id1_0000'}
    assert {v.label for v in m.where(method='real')}=={0} and {v.label for v in m.where(method='Celeb-synthesis')}=={1}

def test_layout_celebdf_v2(sets):
    m = celebdf(sets['celebdf_v2'], val=0); v = m.where(name='id4_id0_0000')[0]
    assert splits(m)==dict(test=5, train=17) and {v.split:v.label for v in m.where(name='00170')}=={'test':0}
    assert (v.target, v.source, v.original)==('Celeb-DF:id4', 'Celeb-DF:id0', 'Celeb-DF-v2/real/as_is/id4_0000')
    assert disjoint(celebdf(sets['celebdf_v2'], splits='people')) and any("splits='people'" in w for w in m.warnings)

def test_layout_celebdf_list_against_folder(mine):
    root = mine('celebdf_v2'); p = root/'List_of_testing_videos.txt'; p.write_text(p.read_text().replace('0 Celeb-synthesis/id3','1 Celeb-synthesis/id3'))
    with pytest.raises(DatasetError, match='line 5.*holds fakes'): celebdf(root)
    p.unlink()
    with pytest.raises(MissingList): celebdf(root)
    root.rename(root.parent/'Celeb-DF')
    with pytest.raises(DatasetError, match='which version'): celebdf(root.parent/'Celeb-DF', splits='none')
    with pytest.raises(DatasetError, match='celebdf_v1 or celebdf_v2'): read_dataset(root.parent/'Celeb-DF')

def test_layout_wilddeepfake(sets, tmp_path):
    m = read_dataset(sets['wilddeepfake'])
    assert splits(m)==dict(test=4, train=8) and {v.kind for v in m}=={'frames'} and len(m.groups)==6
    assert (m[0].path.name, m[0].member, m[0].group, m[0].label)==('1.tar.gz', '1/real/2', 'real_train/1', 0)
    assert any('no sound' in w for w in m.warnings) and any('no validation' in w for w in m.warnings)
    flat = wilddeepfake(miniature('wilddeepfake', tmp_path, packed=False, frames=4))
    assert [(v.key, v.group, v.label) for v in flat]==[(v.key, v.group, v.label) for v in m] and not any(v.member for v in flat)

def test_layout_dfdc(sets, tmp_path):
    m,packed = read_dataset(sets['dfdc'], val_parts=[1]),read_dataset(miniature('dfdc', tmp_path, frames=4))
    assert splits(m)==dict(train=7, val=7) and splits(packed)==dict(train=14)
    assert {v.chunk for v in m}=={'dfdc_train_part_0','dfdc_train_part_1'} and {v.chunk for v in packed}=={'00','01'}
    keys = {v.key:v for v in packed}
    assert all(keys[v.original].group==v.group and not keys[v.original].label for v in packed if v.label) and all(v.member.startswith('dfdc_train_part_') for v in packed)
    assert 'val' in splits(dfdc(sets['dfdc'], val=.9)) and 'train' in splits(dfdc(sets['dfdc'], val=.1))
    for g in (d := dfdc(sets['dfdc'], val=.5)).groups: assert len({v.split for v in d.where(group=g)})==1

def test_layout_dfdc_in_bad_shape(mine):
    root = mine('dfdc'); p = root/'dfdc_train_part_0'/'metadata.json'; d = json.loads(p.read_text()); fakes = [n for n in d if d[n]['label']=='FAKE']
    d[fakes[0]]['label'] = 'maybe'; d[fakes[1]] = ['FAKE']; del d[fakes[2]]; d['../../up.mp4'] = dict(label='REAL'); d['gone.mp4'] = dict(label='REAL'); p.write_text(json.dumps(d)[:-1]+f', "{fakes[3]}":{{"label":"REAL"}}}}')
    m = dfdc(root); assert len(m)==11 and len(m.skipped)==6 and m.where(name=f'dfdc_train_part_0/{fakes[3]}')[0].label==1 and any('2 labelled videos are not there' in w for w in m.warnings)
    p.write_text('{'); m = dfdc(root); assert {v.chunk for v in m}=={'dfdc_train_part_1'} and len(m.skipped)==8
    shutil.copytree(root/'dfdc_train_part_1', root/'again'/'dfdc_train_part_1'); assert len(dfdc(root))==7 and 'is there twice' in str(dfdc(root).skipped)

def test_layout_dfdc_preview(sets):
    m = dfdc_preview(sets['dfdc_preview'], val=0); v = m.where(method='method_B', split='test')[0]
    assert splits(m)==dict(test=5, train=6) and (v.target, v.source)==('DFDC-preview:1260311', 'DFDC-preview:643049')
    assert LAYOUTS['dfdc_preview'].detect(sets['dfdc_preview']) and not LAYOUTS['dfdc'].detect(sets['dfdc_preview']); audit(read_dataset(sets['dfdc_preview'], val=.4))

def test_layout_dfdc_test(mine):
    root = mine('dfdc_test'); m = read_dataset(root); assert Counter((v.label, v.split) for v in m)=={(0,'test'):3, (1,'test'):3}
    (root/'labels.csv').unlink(); (root/'metadata.json').write_text(json.dumps({v.name:dict(is_fake=v.label) for v in m}))
    assert {v.name:v.label for v in read_dataset(root)}=={v.name:v.label for v in m}

def test_layout_fakeavceleb(sets):
    m = fakeavceleb(sets['fakeavceleb'], splits='none')
    assert Counter((v.method, v.label) for v in m)=={('real',0):6, ('RealVideo-FakeAudio',1):6, ('faceswap',1):6, ('wav2lip',1):6}
    assert {(v.trim, v.sound) for v in m}=={(True,True)} and {v.original for v in m if v.label}=={v.key for v in m if not v.label}
    apart = read_dataset(sets['fakeavceleb']); assert disjoint(apart) and set(splits(apart))=={'train','val','test'}; audit(apart)

def test_layout_deeperforensics(sets):
    m = deeperforensics(sets['deeperforensics'], originals=sets['faceforensics'])
    assert splits(m)==dict(test=6, train=6, val=3) and {v.original for v in m if v.label}=={v.key for v in m if not v.label}
    assert {(v.dataset, v.compression) for v in m if not v.label}=={('FaceForensics++','c23')}
    assert any('fakes only' in w for w in read_dataset(sets['deeperforensics']).warnings)

def test_layout_folder(sets):
    m = read_dataset(sets['folder']); assert Counter((v.group, v.label) for v in m)=={(p, l):2-l for p in ('anna','ben','carl') for l in (0,1)}
    with pytest.raises(DatasetError, match='named like fakes of FaceForensics'): read_dataset(sets['faceforensics']/'manipulated_sequences'/'FaceSwap'/'c23'/'videos')

def test_layout_csv_and_manifest(sets, tmp_path):
    m = read_dataset(sets['faceforensics']); assert read_dataset(m.save(tmp_path/'m.jsonl')).hash==m.hash
    (tmp_path/'t.csv').write_text(f"path,label\n{m[0].path},real\n"); assert [v.label for v in read_dataset(tmp_path/'t.csv')]==[0]

def test_layout_deepfakebench(sets, tmp_path):
    m = read_dataset(json_of(sets, 'FaceForensics++')); v = m.where(name='000_003', method='FaceSwap')[0]
    assert splits(m)==dict(test=10, train=10, val=10) and (v.kind, len(v.frames), v.original)==('frames', 7, 'FaceForensics++/real/c23/000')
    assert v.path.is_dir() and (v.path/v.frames[-1]).is_file() and '\\' not in str(v.path)
    assert read_dataset(str(json_of(sets, 'FaceForensics++')).replace('.json', '_c23.json')).hash==m.hash
    root = tmp_path/'f'; (root/'a').mkdir(parents=True); (root/'a'/'0.png').write_bytes(b'x')
    def said(**frames): (root/'x.json').write_text(json.dumps({'FF-DF':{'FF-DF':{'test':{n:dict(frames=f) for n,f in frames.items()}}}})); return deepfakebench(root/'x.json')
    m = said(good=['a/0.png','a/1.png'], up=['a/../a/0.png'], root=['/a/0.png'], gone=['b/0.png'])
    assert [(v.name, v.frames) for v in m]==[('good', ('0.png',))] and '2 listed frames are not there' in m.warnings and Counter(s.reason for s in m.skipped)=={'an unsafe name among its frames':2, 'listed, but not there':1}
    with pytest.raises(DatasetError, match='c40'): deepfakebench(json_of(sets, 'FaceForensics++'), compression='c40')

def test_b4_1_celebdf_trains_on_both_folders_and_on_no_test_video(sets):
    m = celebdf(sets['celebdf_v2']); reals = m.where(split='train', label=0); listed = {l.split('/')[1].strip()[:-4] for l in open(sets['celebdf_v2']/'List_of_testing_videos.txt')}
    assert {v.path.parent.name for v in reals}=={'Celeb-real','YouTube-real'} and not {v.name for v in m if v.split!='test'}&listed
    j = deepfakebench(json_of(sets, 'Celeb-DF-v2')); assert any('lost them' in w for w in j.warnings) and names(j, split='test')=={'00170','id0_0001','id0_id1_0001'} and len({v.key for v in j})==len(j)

def test_b4_2_a_val_that_is_train_or_test_is_none(sets, tmp_path):
    m = deepfakebench(json_of(sets, 'DFDC')); assert splits(m)==dict(test=4, train=4) and len(m.skipped)==4 and any('no validation part' in w for w in m.warnings)
    assert splits(deepfakebench(json_of(sets, 'DFDCP')))==dict(test=3, train=3)
    assert disjoint(deepfakebench(json_of(sets, 'DeepFakeDetection')))
    said,root = {'UADFV_Real':{}, 'UADFV_Fake':{}},tmp_path/'rgb'
    for n in range(6):
        for label,name in (('UADFV_Real',f'{n:04d}'),('UADFV_Fake',f'{n:04d}_fake')):
            (root/'UADFV'/name).mkdir(parents=True); (root/'UADFV'/name/'000.png').write_bytes(b'x')
            for s in ('train','val','test'): said[label].setdefault(s, {})[name] = dict(label=label, frames=[f'UADFV\\{name}\\000.png'])
    (tmp_path/'UADFV.json').write_text(json.dumps(dict(UADFV=said))); m = deepfakebench(tmp_path/'UADFV.json'); audit(m)
    assert set(splits(m))=={'train','val','test'} and len(m)==12 and {len(m.where(group=g)) for g in m.groups}=={2}

def test_b4_4_one_name_in_four_methods_is_four_videos(sets):
    m = deepfakebench(json_of(sets, 'FaceForensics++')); same = m.where(name='000_003')
    assert len(same)==len({v.key for v in same})==len({v.path for v in same})==4 and len({v.key for v in m})==30
    assert len({v.key for v in read_dataset(sets['faceforensics']) if v.name=='000_003'})==5

def test_b4_10_studio_films_are_no_reals_of_deeperforensics(sets, tmp_path):
    m = deeperforensics(sets['deeperforensics'], originals=sets['faceforensics'])
    assert not any('source_videos' in str(v.path) for v in m) and any('studio films' in s.reason for s in m.skipped)
    (tmp_path/'a').mkdir(); (tmp_path/'a'/'0.png').write_bytes(b'x'); one = {'test':{'033_M101':dict(frames=['a/0.png'])}}
    (tmp_path/'x.json').write_text(json.dumps({'DeeperForensics-1.0':dict(DF_fake=one, DF_real=one)})); m = deepfakebench(tmp_path/'x.json')
    assert [v.label for v in m]==[1] and 'studio films' in m.skipped[0].reason

def test_b4_11_the_val_split_is_read(sets):
    for m in (read_dataset(sets['faceforensics'], methods=['Deepfakes']), deepfakebench(json_of(sets, 'FF-DF'))): assert names(m, split='val')=={'672','720','672_720','720_672'}
    m = celebdf(sets['celebdf_v2'], val=.3); learn,choose,_ = sides(m); assert learn and choose and not learn&choose
    for g in m.groups: assert len({v.split for v in m.where(group=g)}-{'test'})<2

def doctor(*args):
    p = subprocess.run([sys.executable,'-m','deepfake_nb.datasets','check',*map(str, args)], capture_output=True, text=True, timeout=120)
    assert 'Traceback' not in p.stderr, p.stderr
    return p.returncode,p.stdout

def test_doctor_by_its_exit_status(sets, tmp_path):
    assert doctor(sets['folder'])[0]==0 and doctor(tmp_path/'nowhere')[0]==2
    code,said = doctor(sets['faceforensics'], '--no-timing'); assert code==1 and 'FaceForensics++ Deepfakes c23: a part, 10 of 1000' in said and 'ondyari/FaceForensics' in said
    code,said = doctor(sets['dfdc'], '--no-timing', '--part', '--json'); assert code==0 and json.loads(said)['layout']=='dfdc' and json.loads(said)['missing']==[]

def test_doctor_finds_what_is_missing_and_what_leaks(sets, mine, capsys):
    root = mine('faceforensics'); (root/'test.json').unlink(); d = check(root, timing=False, part=True); assert d.code==1 and 'test.json' in d.missing[0]
    root = mine('celebdf_v2'); d = check(root, timing=False, part=True); assert d.code==1 and not d.missing and 'share the person' in d.leaks[0]
    assert main(['check',str(root),'--no-timing','--part','--allow','person','--allow','original','--allow','group'])==0
    (root/'YouTube-real'/'00170.mp4').unlink(); (root/'YouTube-real'/'00000.mp4').write_bytes(b''); d = check(root, timing=False, part=True); assert '1 listed videos are not there' in d.missing and 'are empty' in d.missing[1]

def test_doctor_tries_how_long_it_takes(sets):
    t = check(sets['dfdc'], seconds=1.).timing; assert 0<t['core_hours'][0]<=t['core_hours'][1] and t['from_videos']==3 and abs(t['film_hours']*3600/(14*4/25)-1)<.5
    assert check(sets['wilddeepfake'], seconds=1.).timing['film_hours']>0

WORDS = [None, 1, 1.5, 10**400, True, [], {}, [[1]], {'label':'FAKE'}, 'maybe', '', '../../up.mp4', '/etc/passwd', 'C:\\x.png', 'a\0b.mp4', '\ud800.mp4', 'é/ü', 'x'*5000, float('nan')]

def hurt_json(d, rng):
    "One node of it replaced, renamed or doubled"
    at = d
    while isinstance(at, (dict,list)) and at:
        k = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if not isinstance(at[k], (dict,list)) or rng.random()<.3: break
        at = at[k]
    if not (isinstance(at, (dict,list)) and at): return copy.deepcopy(rng.choice(WORDS))
    if isinstance(at, dict) and rng.random()<.4: at[str(rng.choice(WORDS))] = at.pop(k)
    else: at[k] = copy.deepcopy(rng.choice(WORDS))
    return d

def hurt_lines(text, rng):
    lines = text.splitlines(); i = rng.randrange(len(lines)); words = str(rng.choice(WORDS)).encode('utf-8', 'replace').decode()
    lines[i] = rng.choice([words, lines[i]+words, lines[i].replace('/', words), lines[i].replace(',', words), lines[i]*3, lines[i][:len(lines[i])//2], '"'+lines[i]])
    return '\n'.join(lines)

def hurt(data, name, rng):
    how = rng.random()
    if how<.1: return data[:rng.randrange(len(data))]
    if how<.2: i = rng.randrange(len(data)); return data[:i]+rng.randbytes(rng.choice([1,20]))+data[i+5:]
    if how<.3: return rng.choice([b'', b'[]', b'{}', b'null', b'1', b'"x"', b'['*50_000, b'\xff\xfe\0', b'{"a":1,"a":2}', b'\xef\xbb\xbf'+data, b'"'+b'x'*200_000])
    if not name.endswith('.json'): return hurt_lines(data.decode(), rng).encode()
    d = json.loads(data)
    for _ in range(rng.choice([1,1,5,30])): d = hurt_json(d, rng) if isinstance(d, (dict,list)) else d
    return json.dumps(d).encode()

LISTS = dict(faceforensics='train.json val.json test.json conversion_dict.json', celebdf_v1='List_of_testing_videos.txt', celebdf_v2='List_of_testing_videos.txt', dfdc='dfdc_train_part_0/metadata.json dfdc_train_part_1/metadata.json',
             dfdc_preview='dataset.json', dfdc_test='labels.csv', fakeavceleb='meta_data.csv', deeperforensics='lists/splits/train.txt lists/splits/val.txt lists/splits/test.txt',
             deepfakebench=' '.join(f'preprocessing/dataset_json/{n}.json' for n in ('FaceForensics++','FF-DF','DeepFakeDetection','Celeb-DF-v2','DFDC','DFDCP')))

def test_hostile_metadata_gives_an_error_or_skipped_rows(sets, tmp_path):
    rng,roots,refused,read = random.Random(SEED),{n:Path(shutil.copytree(sets[n], tmp_path/n/sets[n].name)) for n in LISTS},0,0
    for i in range(HOSTILE):
        n = list(LISTS)[i%len(LISTS)]; p = roots[n]/rng.choice(LISTS[n].split()); good = p.read_bytes(); p.write_bytes(bad := hurt(good, p.name, rng))
        try:
            m = read_dataset(p if n=='deepfakebench' else roots[n], n); m.save(tmp_path/'m.jsonl'); read += 1
            assert m and Manifest.load(tmp_path/'m.jsonl').hash==m.hash and all(v.path.resolve().is_relative_to(roots[n].resolve()) and v.path.exists() for v in m)
            assert all(isinstance(x, str) for s in m.skipped for x in s) and all(v.label in (0,1) for v in m)
        except DatasetError as e: assert str(e); refused += 1
        except Exception as e: raise AssertionError(f'corruption {i} of {p.name} ({n}): {type(e).__name__}: {e}\n{bad[:400]}') from e
        finally: p.write_bytes(good)
    assert refused+read==HOSTILE and refused>15 and read>30

def test_a_hundred_thousand_entries(mine):
    root = mine('dfdc'); p = root/'dfdc_train_part_0'/'metadata.json'; d = json.loads(p.read_text())
    p.write_text(json.dumps(d|{f'x{i}.mp4':dict(label='FAKE', original='y.mp4') for i in range(100_000)})); m = dfdc(root); assert len(m)==14 and len(m.skipped)==100_000
    root = mine('dfdc_test'); p = root/'labels.csv'; p.write_text(p.read_text()+''.join(f'x{i}.mp4,1\n' for i in range(100_000))); assert len(dfdc_test(root))==6
