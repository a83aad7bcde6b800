"Detect at 720p, faces included: times real time on this machine's cores, seconds to the first score, to --help and to a bad file; with --long the memory of a film of half an hour. The last line is one JSON object."
import argparse,json,os,resource,shutil,subprocess,sys,tempfile,time
from fractions import Fraction
from pathlib import Path
import av,cv2,numpy as np

def film(path, seconds):
    "The woman of the sample pack at 720p, over and over: encoded once, its packets repeated on the clock"
    from deepfake_nb.pack import sample
    from deepfake_nb.video import VideoFile,write_video
    once = write_video(path.with_name('once.mp4'), (cv2.resize(f.image, (1280,720), interpolation=cv2.INTER_CUBIC) for f in VideoFile(sample('woman')) if f.index<240), 24, qp=26); n,at = 0,0
    with av.open(str(path), 'w') as o:
        s = None
        while n<seconds*24:
            with av.open(str(once)) as i:
                v = i.streams.video[0]; s = s or o.add_stream_from_template(v); step = round(Fraction(1, 24)/v.time_base)
                for p in i.demux(v):
                    if p.size and n<seconds*24: p.pts += at; p.dts += at; p.stream = s; o.mux(p); n += 1
            at += 240*step
    return path

def peak(pid):
    "Largest resident memory so far, MB"
    try: return int(next(l for l in open(f'/proc/{pid}/status') if l.startswith('VmHWM')).split()[1])>>10
    except (OSError,StopIteration): return 0

def child(): return max((int(p) for t in Path('/proc/self/task').iterdir() for p in (t/'children').read_text().split()), default=0)

def took(*words, n=5):
    "Seconds of the command, the median of n"
    res = []
    for _ in range(n): t = time.perf_counter(); subprocess.run([sys.executable, '-c', 'import sys; from deepfake_nb.detect import detect_main; sys.exit(detect_main(sys.argv[1:]))', *map(str, words)], capture_output=True); res.append(time.perf_counter()-t)
    return round(float(np.median(res)), 2)

def asked():
    import pandas as pd
    from deepfake_nb.export import Calibration,Exported
    from deepfake_nb.scoring import Detector
    from deepfake_nb.stf_mamba import STFConfig,build_stf_mamba
    d = Detector(build_stf_mamba(STFConfig.phase_a('demo'), 'pack'), 'Phase A, demo', 'STFMamba', 4); r = np.random.default_rng(0)
    return Exported(None, d, {'A':d}, None, Calibration(pd.DataFrame(dict(label=[0,1]*40, group=[f'g{i}' for i in range(80)], score=r.random(80))), 'drawn', None, True, 'drawn'), {}, dict(name='A'))

def measure(path, exported):
    "One verdict: seconds of film a second, seconds to the first score, peaks of both processes, processor seconds of both"
    from deepfake_nb.detect import detect
    first,kid,began = [],[0],time.perf_counter(); cpu = lambda: (time.process_time(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])); before = cpu()
    def tell(at, total, m):
        if m is not None and not first: first.append(time.perf_counter()-began)
        kid[0] = max(kid[0], peak(child()))
    v = detect(path, exported, progress=tell); s = time.perf_counter()-began; mine,its = (b-a for a,b in zip(before, cpu()))
    return dict(film_s=round(v.report['video']['seconds'], 1), wall_s=round(s, 1), times_real_time=round(v.report['video']['seconds']/s, 2), first_score_s=round(first[0], 2), cpu_parent_s=round(mine, 1), cpu_reader_s=round(its, 1), clips=len(v.moments), kept=sum(m.clip is not None for m in v.moments), parent_mb=peak('self'), reader_mb=kid[0], load=round(os.getloadavg()[0], 1))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__); p.add_argument('--seconds', type=float, default=30); p.add_argument('--long', action='store_true', help='half an hour too'); p.add_argument('--minutes', type=float, default=30); a = p.parse_args()
    d = Path(tempfile.mkdtemp())
    try:
        (d/'bad.mp4').write_bytes(bytes(10_000)); res = dict(cores=os.cpu_count(), help_s=took('--help'), missing_s=took(d/'missing.mp4'), bad_file_s=took(d/'bad.mp4')); print(res)
        t = time.perf_counter(); exported = asked(); res['import_s'] = round(time.perf_counter()-t, 2)
        res['720p'] = measure(film(d/'film.mp4', a.seconds), exported); print(res['720p'])
        if a.long: res['long'] = measure(film(d/'long.mp4', 60*a.minutes), exported); print(res['long'])
    finally: shutil.rmtree(d)
    print(json.dumps(dict(unit='wall clock; MB resident', **res)))
