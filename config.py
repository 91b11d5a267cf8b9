"""Every setting of a run, as a flat list of constants.

Each is also a flag of train.py by its lower-case name (`--batch_size 64`), and `--preset NAME` takes a
named group from PRESETS at the end. A flag beats a preset, a preset beats the constant written here; the network of
--init_from beats a preset. A dataset of SOURCES brings a folder and an archive of its own instead of the constants.
The comment behind a constant is what `python train.py --help` prints for it.
Papers: DDPM = Ho et al. 2020, arXiv:2006.11239; iDDPM = Nichol & Dhariwal 2021, arXiv:2102.09672.
"""

# --- data -------------------------------------------------------------------------------------------
DATASET = "tiny-imagenet"  # tiny-imagenet, cifar10, cifar100, mnist, folder (own pictures), shapes, or yours (src/dataset.py)
CLASSES = ""  # names, ids or indices of the classes to train on, "goldfish,n02279972,lemon"; empty: all of them
DATA_PATH = "./data/tiny-imagenet-200"  # folder of the images; those of a published dataset are downloaded if it is absent
DATA_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"  # of tiny-imagenet, or of any mirror of it
DATA_SIZE = 248100043  # bytes of that archive, checked after the download; 0 skips the check
DATA_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"  # md5 of that archive, checked after the download; empty skips the check
CACHE_PATH = "./data/cache"  # where the decoded images are kept as one uint8 array, 12 kB a picture at 64x64 in colour
IMAGE_SIZE = 64  # pixels per side that the network sees; images are centre-cropped and resized to it
CHANNELS = 3  # 3 for colour, 1 for grey: pictures are made so, and drawn so
NUM_WORKERS = -1  # processes that decode images the first time; -1 takes one per CPU core, 0 decodes in the main process
SKIP_DAMAGED = False  # true leaves out pictures that cannot be decoded, and says how many; false stops and names them all
HORIZONTAL_FLIP = True  # mirror half of the training images at random (DDPM, app. B); false for text and the like

# --- network ----------------------------------------------------------------------------------------
UNET_DIM = 128  # channels at full resolution (DDPM, app. B); a multiple of 8, and of 32 from 128 on
DIM_MULTS = (1, 2, 3, 4)  # channels per level in units of UNET_DIM; each level halves the resolution (iDDPM, 64x64)
NUM_RES_BLOCKS = 2  # residual blocks per level on the way down, one more on the way up (DDPM, app. B)
ATTENTION_RESOLUTIONS = (16, 8)  # pixels per side at which self-attention follows each block (iDDPM); 0: only in the middle
DROPOUT = 0.0  # probability inside residual blocks; 0 is off (iDDPM, ImageNet-64); 0.1 for small sets (DDPM, CIFAR-10)
CLASS_CONDITIONAL = False  # true gives the network the class label as well
LABEL_DROPOUT = 0.1  # share of labels hidden in training, for classifier-free guidance (arXiv:2207.12598); 0 is off
ACTIVATION_CHECKPOINTING = False  # recompute blocks: less memory, a third more time

# --- diffusion --------------------------------------------------------------------------------------
TIME_STEPS = 1000  # T, steps in the chain (DDPM, sec. 4); costs ancestral sampling time, not training time
BETA_SCHEDULE = "linear"  # variance of the noise added per step: linear (DDPM, sec. 4) or cosine (iDDPM, eq. 17)
PREDICTION = "eps"  # the network predicts eps, the noise (DDPM, eq. 14); v (arXiv:2202.00512, app. D); or x0, the clean image
MIN_SNR_GAMMA = 0.0  # caps the weight of easy, low-noise steps (arXiv:2303.09556, which takes 5); 0 is off

# --- training ---------------------------------------------------------------------------------------
BATCH_SIZE = 16  # images per forward and backward pass, over all processes together
GRAD_ACCUM_STEPS = 1  # passes per optimizer step; BATCH_SIZE x GRAD_ACCUM_STEPS is the effective batch
LEARNING_RATE = 1e-4  # of Adam, per optimizer step; 2e-4 for 32x32 in DDPM, app. B, less for larger images
LR_SCHEDULE = "constant"  # after the warm-up: constant, or a cosine or linear decay to 1% in the last step of the run
WARMUP_STEPS = 1000  # optimizer steps over which the learning rate rises linearly from 0; 0 is off (DDPM code: 5000)
EPOCHS = 100  # passes over the training images, in all, resumed runs counted in
GRAD_CLIP = 1.0  # largest L2 norm of the gradient (DDPM code); 0 is off
EMA_DECAY = 0.9999  # of the weight average per step (DDPM, app. B), less early on: it trails by a tenth of the steps done,
    # from step 90,000 on by 10,000 (half-life 6931 steps); 0 follows the raw weights
PRECISION = "auto"  # of the network: fp32, bf16, fp16; auto takes bf16 where the device computes in it, else fp32
COMPILE = "auto"  # torch.compile the network: true, false; auto compiles on CUDA
SEED = 0  # of weights, data order, t and noise, 0 to 2^32 - 1; the same seed gives the same run
DEVICE = "auto"  # cuda, mps, cpu; auto takes the first of these that there is

# --- what a run writes ------------------------------------------------------------------------------
VAL_IMAGES = 2000  # held-out images whose loss is measured, at fixed t and noise; decides best.pth
NUM_SAMPLES = 64  # pictures in the preview grid
PREVIEW_STEPS = 20  # DPM-Solver++ steps of the preview grid, not TIME_STEPS, so that a look costs seconds
PREVIEW_GUIDANCE = 2.0  # classifier-free guidance of the preview grid of a class-conditional run; 1 is off
VAL_EVERY = 1  # epochs between validations, each with best.pth if it is the best so far, and latest.pth
SAVE_EVERY = 10  # epochs between epoch_010.pth, epoch_020.pth, ...
SAVE_MINUTES = 10.0  # minutes between further writes of latest.pth inside an epoch; 0 is off
SAMPLE_EVERY = 5  # epochs between preview grids
LOG_EVERY = 50  # optimizer steps between points in TensorBoard; the only times the loop waits for the GPU
RUN = ""  # a name for the run: a sub-folder of CHECKPOINT_PATH, OUTPUT_PATH and LOG_PATH, so that runs do not mix; empty: none
CHECKPOINT_PATH = "./checkpoints"  # folder of latest.pth, best.pth, epoch_010.pth, ...
OUTPUT_PATH = "./outputs"  # folder of samples/epoch_005.png, ...
LOG_PATH = "./logs/tensorboard"  # folder of the TensorBoard events

# What stands in for DATA_PATH, DATA_URL, DATA_SIZE and DATA_MD5 above. A dataset without a row here lies in ./data/NAME.
SOURCES = {
    "tiny-imagenet": {}, "shapes": {},
    "cifar10": dict(
        DATA_PATH="./data/cifar-10-batches-bin", DATA_URL="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        DATA_SIZE=170052171, DATA_MD5="c32a1d4ab5d03f1284b67883e8d87530",
    ),
}

# The network of docs/nature.pth and how it trains, also on own pictures (docs/recipes.md).
nature_recipe = dict(
    UNET_DIM=32, DIM_MULTS=(1, 1, 2, 4), NUM_RES_BLOCKS=1, ATTENTION_RESOLUTIONS=(8,), PREDICTION="v", BETA_SCHEDULE="cosine",
    MIN_SNR_GAMMA=5, LEARNING_RATE=5e-4, LR_SCHEDULE="cosine", GRAD_CLIP=0.1, EMA_DECAY=0.999, BATCH_SIZE=16,
)  # fmt: skip

PRESETS = {
    # Shapes drawn by code, on two CPU cores in minutes: no download, no GPU. Chosen by trial (docs/recipes.md).
    "demo": dict(
        DATASET="shapes", IMAGE_SIZE=24, UNET_DIM=16, DIM_MULTS=(1, 1, 2, 4), NUM_RES_BLOCKS=1, ATTENTION_RESOLUTIONS=(6,),
        CLASS_CONDITIONAL=True, BETA_SCHEDULE="cosine", PREDICTION="v", BATCH_SIZE=16, LEARNING_RATE=4e-3,
        LR_SCHEDULE="cosine", WARMUP_STEPS=100, EPOCHS=6, EMA_DECAY=0.99, VAL_IMAGES=500, NUM_SAMPLES=20, SAMPLE_EVERY=1,
        LOG_EVERY=20, RUN="demo",
    ),
    # MNIST, handwritten digits: grey, with their classes, on two CPU cores in ten minutes (docs/recipes.md).
    "mnist": dict(
        DATASET="mnist", IMAGE_SIZE=28, CHANNELS=1, HORIZONTAL_FLIP=False, UNET_DIM=16, DIM_MULTS=(1, 2, 4), NUM_RES_BLOCKS=1,
        ATTENTION_RESOLUTIONS=(7,), CLASS_CONDITIONAL=True, BETA_SCHEDULE="cosine", PREDICTION="v", LEARNING_RATE=2e-3,
        LR_SCHEDULE="cosine", WARMUP_STEPS=100, EPOCHS=1, EMA_DECAY=0.995, VAL_IMAGES=500, NUM_SAMPLES=20, SAMPLE_EVERY=1,
        RUN="mnist",
    ),
    # Ten classes of Tiny ImageNet: goldfish, monarch, sulphur butterfly, ladybug, jellyfish, coral reef, lemon, orange, alp,
    # seashore. A night on two CPU cores: 3.8 PFLOP. Chosen by trial (docs/recipes.md).
    "nature": dict(
        DATASET="tiny-imagenet", CLASS_CONDITIONAL=True, CLASSES="n01443537, n02279972, n02281406, n02165456, n01910747, "
        "n09256479, n07749582, n07747607, n09193705, n09428293",
        EPOCHS=170, NUM_SAMPLES=40, SAMPLE_EVERY=10, SAVE_EVERY=50, RUN="nature", **nature_recipe,
    ),
    # A folder of 100 to 1,000 pictures: many passes, and a warm-up, an average and saves that fit them (docs/recipes.md).
    "small": dict(
        EPOCHS=1000, WARMUP_STEPS=200, EMA_DECAY=0.999, DROPOUT=0.1, LR_SCHEDULE="cosine", VAL_EVERY=25, SAMPLE_EVERY=50,
        SAVE_EVERY=250,
    ),
    # 100 to 500 own pictures, with --init_from docs/nature.pth: on two CPU cores within an hour (docs/recipes.md).
    "finetune": dict(
        DATASET="folder", WARMUP_STEPS=100, EPOCHS=180, NUM_SAMPLES=20, VAL_EVERY=10, SAMPLE_EVERY=20, SAVE_EVERY=90,
        RUN="fine", **nature_recipe,
    ),
    # One large GPU. The shape: 91M parameters as the default's, 34 GFLOP a picture instead of 61 (docs/recipes.md).
    "h100": dict(BATCH_SIZE=256, LEARNING_RATE=2e-4, DIM_MULTS=(1, 1, 2, 3, 4)),
    # The paper's experiment (DDPM, app. B); 2,052 epochs of 390 steps are its 800,000. The FID to reach: docs/evaluation.md.
    # 38,307,203 parameters, the paper's 35,746,307 and 2,560,896 by which the step scales each block besides shifting it
    # (iDDPM). What else differs: attention has heads of 64 channels instead of one head.
    "cifar10": dict(
        DATASET="cifar10", IMAGE_SIZE=32, DIM_MULTS=(1, 2, 2, 2), ATTENTION_RESOLUTIONS=(16,), DROPOUT=0.1,
        BATCH_SIZE=128, LEARNING_RATE=2e-4, WARMUP_STEPS=5000, EPOCHS=2052,
        SAMPLE_EVERY=50, SAVE_EVERY=250, RUN="cifar10",
    ),
}
