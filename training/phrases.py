"""The tables that captions are drawn from, in English and in Chinese.

A phrase with a verb in brackets takes a subject (the camera, or the thing that moves) and a speed; a phrase without
brackets is complete. English verbs are written in their base form and inflected when a caption is drawn.
With a camera word, or with none, "moves left" is a pan; with the name of a thing it is the object that moves.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "ADJECTIVES", "CAMERAS", "CAMERA_VERBS", "COUNTER", "DISTRACTORS", "DOUBLED", "FIXED", "HOW", "JOINTS", "OPENINGS",
    "PHRASES", "SCENES", "STYLES", "THINGS", "split",
]  # fmt: skip


def split(text: str) -> tuple[str, ...]:
    """The parts of a list written with bars."""
    return tuple(" ".join(part.split()) for part in text.split("|"))


_SIDE = {
    "en": """[pan] SIDE | [pan] to the SIDE | [move] SIDE | [move] to the SIDE | [slide] to the SIDE | [truck] SIDE |
        [sweep] to the SIDE | [glide] SIDE | [drift] to the SIDE | [swing] SIDE | [turn] to the SIDE | [go] SIDE |
        [track] SIDE | [travel] to the SIDE | [shift] towards the SIDE | [head] SIDE | [look] SIDE | SIDE pan |
        [pan] towards the SIDE | pan the camera SIDE | move the camera to the SIDE | camera movement to the SIDE |
        a pan to the SIDE | SIDEward camera movement | camera pan SIDE | tracking shot to the SIDE | whip pan SIDE""",
    "zh": """[向SIDE平移] | [向SIDE移动] | [往SIDE移动] | [SIDE移] | [向SIDE摇] | [往SIDE摇] | [向SIDE摇动] |
        [SIDE摇] | [朝SIDE移动] | [向SIDE侧移动] | [向SIDE边平移] | [往SIDE边移] | [向SIDE滑动] | [横向SIDE移] |
        [往SIDE走] | [转向SIDE侧] | 向SIDE平移镜头 | SIDE移镜头 | 向SIDE移动镜头 | SIDE摇镜头 | 向SIDE的平移镜头""",
}
_PAN_UP = {
    "en": """[pan] up | [pan] upwards | [tilt] up | [tilt] upward | [move] up | [move] upwards | [rise] | [rise] up |
        [crane] up | [lift] up | [go] up | [ascend] | [look] up | [climb] | [float] upwards | [glide] up | upward pan |
        [drift] upwards | pan the camera up | tilt the camera up | move the camera upwards | a tilt up | upward tilt |
        upward camera movement | camera tilt up | crane shot going up | camera rising | [pedestal] up""",
    "zh": """[向上平移] | [向上移动] | [往上移动] | [上移] | [向上摇] | [上摇] | [往上摇] | [升起] | [上升] |
        [向上升起] | [抬起] | [向上抬] | [朝上移动] | [上仰] | [往上抬] | 向上平移镜头 | 上移镜头 | 上摇镜头 |
        抬高镜头 | 升镜头""",
}
_PAN_DOWN = {
    "en": """[pan] down | [pan] downwards | [tilt] down | [tilt] downward | [move] down | [move] downwards | [lower] |
        [sink] down | [crane] down | [descend] | [go] down | [look] down | [glide] down | [drift] downwards |
        downward pan | [come] down | pan the camera down | tilt the camera down | move the camera downwards |
        a tilt down | downward tilt | downward camera movement | camera tilt down | crane shot going down |
        [pedestal] down""",
    "zh": """[向下平移] | [向下移动] | [往下移动] | [下移] | [向下摇] | [下摇] | [往下摇] | [下降] | [向下降落] |
        [降低] | [朝下移动] | [下俯] | [往下压] | [降下来] | 向下平移镜头 | 下移镜头 | 下摇镜头 | 压低镜头 |
        降镜头""",
}
_ZOOM_IN = {
    "en": """[zoom] in | [push] in | [move] in | [move] closer | [dolly] in | [dolly] forward | [move] forward |
        [get] closer | [come] closer | [go] in | [track] in | [push] forward | [approach] | [creep] in |
        [draw] nearer | [fly] forward | [close] in | zoom the camera in | move the camera closer | a push in |
        dolly-in | push-in | closer and closer | a zoom in | forward dolly | camera zoom in | zoom-in shot |
        [glide] forward | [zoom] closer""",
    "zh": """[推近] | [拉近] | [放大] | [推进] | [向前推] | [向前推进] | [靠近] | [往前推] | [前移] | [向前移动] |
        [逐渐靠近] | [变焦放大] | [前进] | [接近] | [凑近] | 推近镜头 | 拉近镜头 | 推镜头 | 放大画面 | 把镜头推近 |
        镜头越来越近""",
}
_ZOOM_OUT = {
    "en": """[zoom] out | [pull] back | [pull] out | [pull] away | [dolly] out | [dolly] back | [move] back |
        [move] backwards | [move] away | [back] off | [back] away | [retreat] | [go] out | [track] back | [draw] back |
        [fly] backwards | zoom the camera out | pull the camera back | a pull back | dolly-out | pull-back shot |
        a zoom out | backward dolly | camera zoom out | zoom-out shot | [widen] | farther and farther away""",
    "zh": """[拉远] | [后退] | [缩小] | [向后拉] | [向后退] | [拉开] | [后移] | [往后退] | [向后移动] | [远离] |
        [逐渐远离] | [往后拉] | [退后] | [变焦缩小] | [向后拉远] | 拉远镜头 | 后拉镜头 | 拉镜头 | 缩小画面 |
        把镜头拉远 | 镜头越来越远""",
}
_ROLL = {
    "en": """[roll] SIDE | [roll] to the SIDE | [roll] CLOCK | [rotate] CLOCK | [turn] CLOCK | [spin] CLOCK |
        [tilt] CLOCK | [twist] CLOCK | [revolve] CLOCK | a CLOCK roll | CLOCK rotation | CLOCK camera roll |
        CLOCK spin | CLOCK turn | roll the camera CLOCK | rotate the camera CLOCK | turn the picture CLOCK |
        camera roll to the SIDE | SIDE roll | rotation in the CLOCK direction""",
    "zh": """[CLOCK旋转] | [CLOCK转动] | [CLOCK滚动] | [CLOCK翻滚] | [向SIDE旋转] | [CLOCK转] | [沿CLOCK方向旋转] |
        [按CLOCK方向转动] | [以CLOCK旋转] | [向SIDE翻滚] | [向SIDE滚动] | CLOCK旋转镜头 | CLOCK转动画面 |
        CLOCK旋转画面""",
}
_STILL = {
    "en": """static shot | static camera | the camera does not move | the camera doesn't move |
        the camera stays still | the camera remains still | fixed camera | still camera | locked camera |
        locked-off shot | tripod shot | no camera movement | no movement | no motion | nothing moves |
        nothing is moving | the camera is fixed | still shot | without any movement | do not move the camera |
        don't move | keep the camera still | the camera is static | the camera holds still | motionless |
        stationary camera | hold the shot | stay still | no pan, no zoom | a still | the camera stays in place |
        keep everything still | keep still""",
    "zh": """静止镜头 | 固定机位 | 镜头静止 | 镜头固定 | 固定镜头 | 镜头不动 | 镜头不移动 | 镜头保持静止 |
        相机固定不动 | 没有镜头运动 | 没有运动 | 画面不动 | 画面静止不动 | 静态镜头 | 静态画面 | 机位不变 |
        不要移动镜头 | 三脚架拍摄 | 保持静止 | 保持不动 | 镜头保持不变 | 摄像机不动 | 完全静止 | 静止""",
}
_DARKEN = {
    "en": """it [get] dark | it [get] darker | it [become] dark | it [grow] dark | day [turn] to night | night [fall] |
        the light [fade] | the light [dim] | the scene [darken] | the sky [darken] | the sun [set] | darkness [fall] |
        the lights [go] out | everything [get] darker | the sun [go] down | the picture [fade] to black |
        evening [come] | the day [end] | from day to night | darker and darker | fade to black | fade out to dark |
        turning dark | dusk falls | dim the light | make it darker | the room [become] dark | the light [go] away |
        getting darker""",
    "zh": """天色[变暗] | 天[变黑] | 天[黑了] | 夜幕[降临] | 光线[变暗] | 灯光[变暗] | 画面[变暗] | 太阳[落山] |
        天[黑下来] | 场景[变暗] | 光线[暗下来] | 灯光[熄灭] | 从白天到黑夜 | 白天变成黑夜 | 天越来越黑 | 越来越暗 |
        由明变暗 | 日落天黑 | 渐渐变黑 | 夜色[来临] | 光线[减弱] | 关灯 | 入夜""",
}
_BRIGHTEN = {
    "en": """it [get] bright | it [get] brighter | it [become] light | it [grow] lighter | night [turn] to day |
        day [break] | the light [grow] stronger | the light [increase] | the scene [brighten] | the sky [brighten] |
        the sun [rise] | the sun [come] up | the sun [come] out | everything [get] brighter | morning [come] |
        dawn [come] | dawn breaks | from night to day | brighter and brighter | fade in from dark | lighting up |
        make it brighter | sunrise comes | the lights [go] on | the room [become] bright | turn up the light |
        the day [begin] | getting brighter""",
    "zh": """天[亮了] | 天色[变亮] | 光线[变亮] | 灯光[变亮] | 画面[变亮] | 太阳[升起] | 天[亮起来] | 场景[变亮] |
        光线[变强] | 光线[增强] | 灯光[亮起] | 太阳[出来了] | 从黑夜到白天 | 黑夜变成白天 | 天越来越亮 | 越来越亮 |
        由暗变明 | 日出天亮 | 渐渐变亮 | 黎明[到来] | 早晨[来临] | 开灯 | 破晓""",
}
_OBJECT_SIDE = {
    "en": """[move] SIDE | [move] to the SIDE | [slide] SIDE | [slide] to the SIDE | [drift] to the SIDE | [go] SIDE |
        [run] to the SIDE | [walk] to the SIDE | [drive] to the SIDE | [fly] SIDE | [travel] to the SIDE |
        [head] SIDE | [glide] to the SIDE | [float] SIDE | [swim] to the SIDE | [roll] along to the SIDE |
        [pass] by to the SIDE | [move] from OTHER to SIDE | [cross] the frame from OTHER to SIDE |
        [move] towards the SIDE | [shift] to the SIDE | [run] SIDE | [walk] towards the SIDE |
        [sail] off to the SIDE""",
    "zh": """[向SIDE移动] | [往SIDE移动] | [向SIDE滑动] | [向SIDE走] | [往SIDE跑] | [向SIDE飞] | [朝SIDE移动] |
        [向SIDE边漂] | [从OTHER向SIDE移动] | [从OTHER往SIDE走] | [向SIDE行驶] | [往SIDE边走] | [向SIDE侧移动] |
        [往SIDE开] | [向SIDE游] | [向SIDE平移] | [往SIDE飞去] | [向SIDE边跑去]""",
}
_OBJECT_UP = {
    "en": """[move] up | [move] upwards | [rise] | [rise] up | [float] up | [go] up | [fly] up | [climb] up |
        [ascend] | [slide] up | [drift] upwards | [lift] off | [take] off | [soar] up | [move] to the top |
        [shoot] up | [rise] into the air | [fly] up into the sky | [jump] up | [float] away upwards""",
    "zh": """[向上移动] | [往上移动] | [上升] | [升起] | [向上飞] | [往上飞] | [飘起来] | [飞起来] | [升上天空] |
        [向上升] | [往上升] | [飞上天] | [朝上移动] | [向上滑动] | [上移] | [往上飘] | [升到空中] | [起飞] |
        [向上爬]""",
}
_OBJECT_DOWN = {
    "en": """[move] down | [move] downwards | [fall] | [fall] down | [drop] | [drop] down | [sink] | [go] down |
        [descend] | [slide] down | [drift] downwards | [come] down | [float] down | [move] to the bottom | [fly] down |
        [fall] to the ground | [drop] out of the sky | [sink] lower | [tumble] down | [land]""",
    "zh": """[向下移动] | [往下移动] | [下降] | [落下] | [向下落] | [往下掉] | [掉下来] | [落下来] | [下沉] |
        [向下滑动] | [往下落] | [降落] | [朝下移动] | [下移] | [往下飘] | [落到地上] | [掉落] | [向下飞] |
        [沉下去]""",
}
_DIAGONAL = {
    "en": """[move] HEIGHT and to the SIDE | [move] SIDE and HEIGHT | [pan] HEIGHT and SIDE | [pan] SIDE and HEIGHT |
        [drift] diagonally HEIGHT and to the SIDE | [move] diagonally to the CORNER SIDE |
        [pan] towards the CORNER SIDE | [glide] SIDE and HEIGHTwards | diagonal pan to the CORNER SIDE |
        [go] HEIGHT to the SIDE | [shift] CORNER SIDE""",
    "zh": """[向SIDEHEIGHT方移动] | [往SIDEHEIGHT方移动] | [朝SIDEHEIGHT方平移] | [向SIDEHEIGHT方平移] |
        [向SIDEHEIGHT移] | [往SIDEHEIGHT方摇] | 向SIDEHEIGHT方移动镜头 | [向SIDEHEIGHT角移动] |
        [斜着向SIDEHEIGHT移动]""",
}
_CHINESE = {
    "left": "左", "right": "右", "up": "上", "down": "下", "upper": "上", "lower": "下",
    "clockwise": "顺时针", "counterclockwise": "逆时针",
}  # fmt: skip
SCENES = {
    "en": """a red boat on a lake | a lighthouse by the sea | an old stone bridge | a city street at night |
        a wooden cabin | a harbour with fishing boats | snowy mountains | a sunny beach | a castle on a hill |
        a bowl of fruit on a table | a cat on a window sill | a dog running on the beach | a woman in a red dress |
        an old man with a beard | a rose | a child with a balloon | a market square | a church tower |
        a field of sunflowers | a steam train | a bicycle | a waterfall in the jungle | a quiet village |
        a foggy forest | a dark alley | a bright kitchen | a living room | a vintage car | a cup of coffee on a desk |
        a desert with sand dunes | a river through a valley | a garden | a glass of wine | palm trees at sunset |
        a skyline at sunrise | a train station | a library full of books | a temple in the rain |
        a rocky coast with waves | a green meadow with cows | a horse in a field | a bird | a close-up of a flower |
        a portrait of a young girl | a couple walking in the park | people in a cafe | an airport | a sailing ship |
        a wooden table | a plate of food | a museum hall | a spiral staircase | a narrow canal | fireworks |
        a windmill | a farm house | a pier | autumn leaves | a frozen lake | a night sky full of stars |
        the full moon | a volcano | a coral reef | a goldfish | a butterfly on a leaf | a robot |
        an astronaut on the moon | a statue | a fountain in the square | a shop window | a neon sign |
        a busy road with cars | a bus stop | a football stadium | a concert stage | a piano | a guitar on the wall |
        a candle | a campfire | an island | a hot air balloon | a cliff | rooftops of an old town | ancient ruins |
        a cave | a barn in the snow | rice terraces | a tram | a teapot | a clock | a baby smiling at the camera |
        a wolf in the woods | a tall tree | waves crashing on the shore | a house | falling snow over the city |
        water flowing over rocks | clouds above the hills | an apple | a harbour at dusk | a launch pad at dusk |
        mountains at dawn | a bridge in the evening light | a town in the morning sun | a moonlit garden |
        a dim workshop | a stage in bright light | a sunlit room | a bay at nightfall""",
    "zh": """湖上的红色小船 | 海边的灯塔 | 一座古老的石桥 | 夜晚的城市街道 | 湖边的小屋 | 停满渔船的港口 | 雪山 |
        阳光下的沙滩 | 山上的城堡 | 桌上的一碗水果 | 窗台上的猫 | 在海滩上奔跑的狗 | 穿红裙子的女人 | 留着胡子的老人 |
        拿着气球的孩子 | 集市 | 教堂的塔楼 | 一片向日葵 | 蒸汽火车 | 一辆自行车 | 丛林里的瀑布 | 安静的村庄 |
        雾中的森林 | 黑暗的小巷 | 明亮的厨房 | 客厅 | 一辆老爷车 | 桌上的一杯咖啡 | 沙漠里的沙丘 | 穿过山谷的河流 |
        花园 | 一杯红酒 | 夕阳下的椰子树 | 日出时的城市 | 火车站 | 图书馆里的书 | 雨中的寺庙 | 海浪拍打着岩石 |
        绿色的草地和牛 | 田野里的马 | 一只小鸟 | 花的特写 | 小女孩的肖像 | 公园里散步的情侣 | 咖啡馆里的人们 | 机场 |
        帆船 | 木桌 | 一盘美食 | 博物馆大厅 | 旋转楼梯 | 狭窄的运河 | 烟花 | 风车 | 农家院子 | 码头 | 秋天的落叶 |
        结冰的湖面 | 满天星星的夜空 | 月亮 | 火山 | 珊瑚礁 | 一条金鱼 | 叶子上的蝴蝶 | 机器人 | 月球上的宇航员 | 雕像 |
        广场上的喷泉 | 商店的橱窗 | 霓虹灯 | 车水马龙的马路 | 公交车站 | 足球场 | 舞台 | 钢琴 | 吉他 | 蜡烛 | 篝火 |
        小岛 | 热气球 | 悬崖 | 老城的屋顶 | 古代遗迹 | 山洞 | 梯田 | 电车 | 茶壶 | 对着镜头微笑的宝宝 | 树林里的狼 |
        一棵大树 | 岸边的浪花 | 城市上空飘着雪 | 流过石头的水 | 山上的云 | 江南水乡 | 长城 | 竹林 | 荷花池 |
        一位美丽的姑娘 | 高楼大厦 | 黄昏的港口 | 傍晚的发射场 | 清晨的山 | 夜色中的大桥 | 晨光里的小镇 | 月光下的花园 |
        昏暗的作坊 | 灯光明亮的舞台 | 阳光照进来的房间""",
}
DISTRACTORS = {
    "en": """a tree on the left | a house on the right | a tall building with a clock on top | a dog on the left side |
        a boat to the right of the pier | a man standing on the right | the left bank of the river |
        a lamp in the top corner | a cup at the bottom of the picture | stairs going up to the temple |
        a road leading down to the sea | a dark night | a woman looking to the left | shelves from left to right |
        a sign pointing right | a bird up in the tree | at dusk | at dawn | in the evening light |
        in bright sunshine""",
    "zh": """左边的树 | 右边的房子 | 左侧有一只狗 | 右侧站着一个人 | 顶上有钟的高楼 | 河的左岸 | 右上角的灯 |
        桌子下面的猫 | 通往山上的台阶 | 看向左边的女人 | 天上的鸟 | 楼下的街道 | 左手拿着花的女孩 | 黑夜里的房子 |
        指向右边的路牌 | 黄昏时分 | 清晨 | 夜里 | 阳光明媚""",
}
STYLES = {
    "en": """cinematic | highly detailed | 4k | 8k, high quality | film grain | photorealistic | soft light |
        warm colors | cinematic lighting, sharp focus | masterpiece | smooth motion | realistic |
        shallow depth of field | golden hour | best quality | shot on 35mm film | dramatic | beautiful | HDR |
        moody atmosphere""",
    "zh": """电影感 | 高清 | 电影感，高清 | 细节丰富 | 画质清晰 | 写实风格 | 柔和的光线 | 暖色调 | 电影质感，4k |
        杰作 | 最佳质量 | 唯美 | 流畅 | 真实 | 浅景深 | 氛围感 | 大师作品""",
}
THINGS = {
    "en": """the subject | the object | the car | the boat | the dog | the cat | the man | the woman | the child |
        the bird | the ball | a balloon | the train | the bus | the plane | the leaf | the fish | the ship |
        the horse | a person | the person | the box | the cup | the flower | he | she | the foreground object |
        the red ball | an apple | the kite | a butterfly | the bicycle | the girl in the hat | the main character |
        the rocket | the duck | a feather""",
    "zh": """主体 | 物体 | 汽车 | 小船 | 小狗 | 猫 | 男人 | 女人 | 孩子 | 小鸟 | 球 | 气球 | 火车 | 公交车 | 飞机 |
        叶子 | 鱼 | 轮船 | 马 | 人物 | 那个人 | 盒子 | 杯子 | 花朵 | 他 | 她 | 前景物体 | 红色的球 | 苹果 | 风筝 |
        蝴蝶 | 自行车 | 戴帽子的女孩 | 主角 | 鸭子 | 羽毛 | 前面的物体 | 一个人""",
}
OPENINGS = {
    "en": "a photo of | a video of | a picture of | an image of | make a video of | a short clip of | a scene with",
    "zh": "一个视频 | 一张照片 | 生成视频 | 让照片变成视频 | 一段视频 | 一幅画面 | 图片",
}
CAMERAS = {
    "en": "the camera | the camera | the camera | camera | the view | the shot | we",
    "zh": "镜头 | 镜头 | 镜头 | 摄像机 | 相机 | 视角 | 摄影机 | 让镜头",
}
FIXED = {
    "en": """static camera | fixed camera | while the camera stays still | the camera does not move | static shot |
        fixed shot | tripod shot | while the camera is fixed | the camera stays still""",
    "zh": "镜头不动 | 固定机位 | 镜头固定 | 静止镜头 | 镜头保持静止 | 相机不动 | 固定镜头",
}
HOW = {
    "en": {
        "slow": "slowly | gently | gradually | very slowly | softly | at a slow pace | little by little",
        "fast": "quickly | fast | rapidly | swiftly | very fast | at high speed | in a hurry",
        "normal": " | | | | | smoothly | steadily",
    },
    "zh": {
        "slow": "缓慢 | 慢慢 | 缓缓 | 缓慢地 | 慢慢地 | 慢速 | 轻轻",
        "fast": "快速 | 迅速 | 飞快地 | 快速地 | 急速 | 很快地 | 高速",
        "normal": " | | | | | 平稳地 | 平滑",
    },
}
ADJECTIVES = {"slow": "slow | gentle | slow, gentle", "fast": "fast | quick | rapid", "normal": " | | smooth"}
JOINTS = {
    "en": " and |, |, and | + | & |, also ",
    "zh": "，同时|并|，并且|的同时|，|同时|且|+|和",
}
COUNTER = split("counterclockwise | counter-clockwise | anticlockwise | anti-clockwise | counter clockwise")
CAMERA_VERBS = ("pan", "tilt", "truck", "crane", "pedestal", "track", "camera", "摇", "镜头")
"""What only a camera does."""
DOUBLED = {"pan", "run", "get", "set", "drop", "swim", "spin", "dim"}
"""Verbs whose last letter doubles before -ing."""


def _fill(table: Mapping[str, str], **words: str) -> dict[str, tuple[str, ...]]:
    """The phrasings of a table by language, with the words in their places."""
    found: dict[str, tuple[str, ...]] = {}
    for language, text in table.items():
        filled = text
        for slot, word in words.items():
            filled = filled.replace(slot, _CHINESE[word] if language == "zh" else word)
        found[language] = split(filled)
    return found


def _phrases() -> dict[str, dict[str, tuple[str, ...]]]:
    found = {"still": _fill(_STILL), "darken": _fill(_DARKEN), "brighten": _fill(_BRIGHTEN)}
    found |= {"pan-up": _fill(_PAN_UP), "pan-down": _fill(_PAN_DOWN)}
    found |= {"zoom-in": _fill(_ZOOM_IN), "zoom-out": _fill(_ZOOM_OUT)}
    found |= {"object-up": _fill(_OBJECT_UP), "object-down": _fill(_OBJECT_DOWN)}
    for side, other, clock in (("left", "right", "counterclockwise"), ("right", "left", "clockwise")):
        found[f"pan-{side}"] = _fill(_SIDE, SIDE=side)
        found[f"roll-{side}"] = _fill(_ROLL, SIDE=side, CLOCK=clock)
        found[f"object-{side}"] = _fill(_OBJECT_SIDE, SIDE=side, OTHER=other)
        for height, corner in (("up", "upper"), ("down", "lower")):
            found[f"pan-{side}+pan-{height}"] = _fill(_DIAGONAL, SIDE=side, HEIGHT=height, CORNER=corner)
    return found


PHRASES: Mapping[str, Mapping[str, tuple[str, ...]]] = _phrases()
"""Motion -> language -> phrasings. Speeds and the other pairs are put together from these."""
