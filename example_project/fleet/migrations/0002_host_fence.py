from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("fleet", "0001_initial")]

    operations = [
        migrations.AddField(
            model_name="host",
            name="fence",
            field=models.BigIntegerField(default=0),
        ),
    ]
