import numpy as np
from tests.spikes.simulate import SERIES, detected
for name,s in SERIES.items():
    out=[]
    for T in (6.0,7.0,8.0):
        c=[0,0]
        for seed in (5,6,7):
            for e in detected(s(np.random.default_rng(seed),40000),T).events: c[e.duration>1]+=1
        out.append(f"{T:g}: {c[0]}/{c[1]}")
    print(name,out,flush=True)
