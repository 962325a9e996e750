"""The baseline loop: SESEMI as a plain PyTorch loop, written as the published one is, and sharing no code with this package.
Images are decoded and augmented by PIL at every visit, rotated in the workers, sent as float32; the labelled loader, with its workers, starts over whenever it runs out."""
import random
from pathlib import Path
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader,Dataset
from torchvision import transforms as T

class Gamma:
    def __call__(self, im): return T.functional.adjust_gamma(im, random.uniform(.5,1.5))

def augmentation(size):
    return T.Compose([T.RandomResizedCrop(size, scale=(.2,1.)), Gamma(), T.RandomHorizontalFlip(), T.ToTensor(),
                      T.Normalize([.485,.456,.406],[.229,.224,.225])])

def read(path):
    with open(path,'rb') as f: return Image.open(f).convert('RGB')

class Labelled(Dataset):
    def __init__(self, root, size):
        self.tfm,classes = augmentation(size),sorted(o.name for o in (Path(root)/'val').iterdir())
        self.items = [(f,i) for i,c in enumerate(classes) for f in sorted((Path(root)/'train'/c).iterdir())]
        self.n_classes = len(classes)
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.tfm(read(self.items[i][0])),self.items[i][1]

class Rotated(Dataset):
    def __init__(self, files, size): self.files,self.tfm = files,augmentation(size)
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        x = self.tfm(read(self.files[i]))
        return torch.stack([torch.rot90(x, k, (1,2)) for k in range(4)]),torch.arange(4)

def again(loader):
    "Batches without end; the loader is started anew each time it runs out"
    while True: yield from loader

class Loop:
    "The network, its optimizer and both streams; `run(n)` makes `n` steps from freshly started loaders"
    def __init__(self, arch, root, files, size, unlabeled_bs, num_workers, device='cpu'):
        self.device = torch.device(device)
        lab,unl = Labelled(root, size),Rotated(files, size)
        kw = dict(shuffle=True, drop_last=True, num_workers=num_workers)
        self.labelled,self.unlabelled = DataLoader(lab, batch_size=4*unlabeled_bs, **kw),DataLoader(unl, batch_size=unlabeled_bs, **kw)
        self.net = arch()
        width,self.net.fc = self.net.fc.in_features,nn.Identity()
        self.fc,self.head = nn.Sequential(nn.Dropout(.5), nn.Linear(width, lab.n_classes)),nn.Linear(width, 4)
        for o in (self.net, self.fc, self.head): o.to(self.device)
        self.opt = torch.optim.SGD([*self.net.parameters(), *self.fc.parameters(), *self.head.parameters()], lr=.01, momentum=.9, nesterov=True, weight_decay=5e-4)
        self.net.train()

    def step(self, x, y, views, targets):
        loss = F.cross_entropy(self.fc(self.net(x)), y)
        loss = loss+F.cross_entropy(self.head(self.net(views)), targets)
        self.opt.zero_grad(); loss.backward(); self.opt.step()
        return loss.item()

    def run(self, n):
        for (x,y),(views,targets),_ in zip(again(self.labelled), again(self.unlabelled), range(n)): self.step(*(o.to(self.device) for o in (x, y, views.flatten(0,1), targets.flatten())))
